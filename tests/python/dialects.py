"""Replies and streams of `/v1/responses` and `/v1/messages`, checked: every member, every event, every order."""

import json
import re

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

_RESPONSE = TypeAdapter(Response)
_RESPONSE_EVENT = TypeAdapter(ResponseStreamEvent)

_ANTHROPIC_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error", 504: "timeout_error"}
_MESSAGE = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
_USAGE = {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"}
_BLOCKS = {"text": {"text"}, "thinking": {"thinking", "signature"}, "tool_use": {"id", "name", "input"}}
# What a delta of a block is called, and its text.
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"), "tool_use": ("input_json_delta", "partial_json")}


def named_events(text: str) -> list[dict]:
    """The data of each event; its name must be its type. Comments are left out."""
    events = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert len(lines) == 2 and lines[0].startswith("event: ") and lines[1].startswith("data: "), block
            event = json.loads(lines[1].removeprefix("data: "))
            assert lines[0] == f"event: {event['type']}", block
            events.append(event)
    return events


def check_response(reply: dict) -> dict:
    """A whole response, as OpenAI's client types it. Gives it back."""
    _RESPONSE.validate_python(reply)
    assert re.fullmatch(r"resp_[0-9a-f]{32}", reply["id"]) and reply["object"] == "response" and reply["store"] is False
    usage = reply["usage"]
    assert usage is None or usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert (reply["status"] == "incomplete") == (reply["incomplete_details"] is not None)
    for item in reply["output"]:
        assert re.fullmatch({"message": "msg", "function_call": "fc", "reasoning": "rs"}[item["type"]] + r"_[0-9a-f]{32}", item["id"])
    return reply


def check_response_stream(events: list[dict]) -> dict:
    """The events of a response in their order. Gives back the response at its end."""
    for number, event in enumerate(events):
        _RESPONSE_EVENT.validate_python(event)
        assert event["sequence_number"] == number
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    final = check_response(events[-1]["response"])
    assert events[-1]["type"] == f"response.{final['status']}"
    for index, item in enumerate(final["output"]):
        of_item = [event for event in events if event.get("output_index") == index]
        assert of_item[0]["type"] == "response.output_item.added" and of_item[-1]["type"] == "response.output_item.done"
        assert of_item[-1]["item"] == item
        text = "".join(event["delta"] for event in of_item if "delta" in event)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    return final


def check_message(reply: dict) -> dict:
    """A whole message of Anthropic's. Gives it back."""
    assert set(reply) == _MESSAGE and reply["type"] == "message" and reply["role"] == "assistant", reply
    assert re.fullmatch(r"msg_[0-9a-f]{32}", reply["id"])
    assert set(reply["usage"]) == _USAGE and all(isinstance(count, int) and count >= 0 for count in reply["usage"].values())
    assert (reply["stop_reason"] == "stop_sequence") == (reply["stop_sequence"] is not None)
    for block in reply["content"]:
        assert set(block) == {"type"} | _BLOCKS[block["type"]], block
    assert ("tool_use" in [block["type"] for block in reply["content"]]) or reply["stop_reason"] != "tool_use"
    return reply


def check_message_stream(events: list[dict]) -> dict:
    """The events of a message in their order. Gives back the message that they make."""
    assert events[0]["type"] == "message_start" and events[1]["type"] == "ping"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = check_message(events[0]["message"])
    assert message["content"] == [] and message["stop_reason"] is None
    texts, is_open = [], False
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(texts)
            message["content"].append(event["content_block"])
            texts.append("")
            is_open = True
            continue
        assert is_open and event["index"] == len(texts) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        kind, member = _DELTAS[message["content"][-1]["type"]]
        assert event["type"] == "content_block_delta" and event["delta"]["type"] == kind
        texts[-1] += event["delta"][member]
    assert not is_open
    for block, text in zip(message["content"], texts):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
        else:
            block[block["type"]] = text
    return check_message({**message, **events[-2]["delta"], "usage": events[-2]["usage"]})


def check_anthropic_error(status: int, body: dict) -> dict:
    """Anthropic's error. Gives back what is inside `error`."""
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error" and body["request_id"], body
    error = body["error"]
    assert error["type"] == _ANTHROPIC_ERRORS.get(status, "invalid_request_error") and error["message"], (status, error)
    return error
