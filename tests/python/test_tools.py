"""Tool calls with the official client: forced by grammar, and found in what a model writes, in each model family's format."""

import asyncio
import json
import re

import jsonschema
import openai
import pytest

from conftest import MODELS
from scripted_model import write_model
from wire import check_error, check_reply

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"]}
SUM = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
SCHEMAS = {"get_weather": CITY, "add": SUM}
TOOLS = [{"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": schema}}
         for name, schema in SCHEMAS.items()]
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]
NAMED = {"type": "function", "function": {"name": "add"}}


def plain(message) -> dict:
    """A message without what is random."""
    calls = [dict(name=call.function.name, arguments=call.function.arguments) for call in message.tool_calls or []]
    return dict(content=message.content or "", reasoning=getattr(message, "reasoning", None), calls=calls)


def put_together(chunks: list) -> tuple[dict, str]:
    """What a stream adds up to, as a client does it, and its reason to end."""
    content, reasoning, calls, reason = "", None, [], None
    for chunk in chunks:
        check_reply(chunk.to_dict(), chunk=True)
        for choice in chunk.choices:
            assert reason is None, "nothing follows the end"
            reason = choice.finish_reason
            content += choice.delta.content or ""
            thought = getattr(choice.delta, "reasoning", None)
            reasoning = (reasoning or "") + thought if thought else reasoning
            for part in choice.delta.tool_calls or []:
                if part.id:
                    assert part.index == len(calls) and part.type == "function" and re.fullmatch(r"call_[0-9a-f]{24}|[0-9a-f]{9}", part.id)
                    calls.append(dict(name=part.function.name, arguments=""))
                else:
                    assert part.function.name is None and part.type is None
                calls[part.index]["arguments"] += part.function.arguments
    return dict(content=content, reasoning=reasoning, calls=calls), reason


def check_calls(message: dict):
    assert message["calls"] and not message["content"], message
    for call in message["calls"]:
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("model", MODELS)
def test_a_forced_call_is_valid_whatever_the_model_would_say(client, model, choice):
    for temperature in (0, 1):
        arguments = dict(model=model, messages=ASK, tools=TOOLS, tool_choice=choice, temperature=temperature, seed=7,
                         max_tokens=300, parallel_tool_calls=False)
        reply = client.chat.completions.create(**arguments)
        check_reply(reply.to_dict())
        message = plain(reply.choices[0].message)
        check_calls(message)
        assert len(message["calls"]) == 1
        if choice is NAMED:
            assert message["calls"][0]["name"] == "add"
        assert reply.choices[0].finish_reason == ("stop" if choice is NAMED else "tool_calls")
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        assert put_together(chunks) == (message, reply.choices[0].finish_reason)
        assert sum(bool(chunk.choices and chunk.choices[0].delta.tool_calls) for chunk in chunks) > 2, "arguments come in pieces"


def cases() -> list[dict]:
    """64 requests over the base and its adapters, some greedy and some drawn, forced, named and free."""
    choices = ["required", NAMED, "auto", "required"]
    return [dict(model=MODELS[i % len(MODELS)], tool_choice=choices[i // 5 % 4], temperature=i % 2, seed=i, max_tokens=60,
                 messages=[{"role": "user", "content": f"What is {i} + {i}?"}], tools=TOOLS, parallel_tool_calls=i % 3 == 0)
            for i in range(64)]


def test_64_streams_at_once_equal_their_solo_runs(demo):
    async def ask(client, case):
        stream = await client.chat.completions.create(**case, stream=True)
        return put_together([chunk async for chunk in stream])

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{demo.base}/v1", api_key="EMPTY", max_retries=0, timeout=300) as client:
            solo = [await ask(client, case) for case in cases()]
            together = await asyncio.gather(*(ask(client, case) for case in cases()))
            return solo, together

    solo, together = asyncio.run(run())
    assert together == solo
    for case, (message, reason) in zip(cases(), together):
        if case["tool_choice"] != "auto":
            assert message["calls"] and not message["content"], case
            if reason != "length":
                check_calls(message)
    assert len({json.dumps(message) for message, _ in together}) > 20, "the requests differ"
    assert sum(len(message["calls"]) for message, _ in together) >= 48


OSLO = dict(name="get_weather", arguments='{"city": "Oslo", "unit": "C"}')
CALL = ['{"name": ', '"get_weather", ', '"arguments": ', '{"city": ', '"Oslo", "un', 'it": "C"}}']
# The pieces in which a model writes one call, which of them are special tokens, and the content in front.
FORMATS = {
    "hermes": (["Let me ", "see.\n", "<tool_call>", "\n", *CALL, "\n</tool_", "call>"], ["<tool_call>"], "Let me see."),
    "llama3_json": (["<|python_tag|>", *(piece.replace("arguments", "parameters") for piece in CALL)], ["<|python_tag|>"], ""),
    "mistral": (["[TOOL_CALLS]", " [", *CALL[:-1], 'it": "C"}}]'], ["[TOOL_CALLS]"], ""),
    "mistral_args": (["[TOOL_CALLS]", "get_wea", "ther", "[ARGS]", '{"city": "O', 'slo", "unit": ', '"C"}'], ["[TOOL_CALLS]", "[ARGS]"], ""),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_in_what_a_model_writes(start_server, tmp_path, name):
    pieces, special, content = FORMATS[name]
    other = ["No ca", "ll he", "re: {\"a\"", ": 1}"]
    write_model(tmp_path / name, {"call": pieces, "text": other}, special)
    server = start_server("--model-id", str(tmp_path / name), "--tool-call-parser", name, "--served-model-name", "m")
    with openai.OpenAI(base_url=f"{server.base}/v1", api_key="EMPTY", max_retries=0, timeout=60) as client:
        def ask(say: str, **more):
            arguments = dict(model="m", messages=ASK, temperature=0, extra_body={"chat_template_kwargs": {"say": say}}, **more)
            reply = client.chat.completions.create(**arguments)
            check_reply(reply.to_dict())
            stream = put_together(list(client.chat.completions.create(**arguments, stream=True)))
            assert stream == (plain(reply.choices[0].message), reply.choices[0].finish_reason)
            return stream

        message, reason = ask("call", tools=TOOLS)
        assert (message, reason) == (dict(content=content, reasoning=None, calls=[OSLO]), "tool_calls")
        message, reason = ask("text", tools=TOOLS)
        assert (message, reason) == (dict(content="".join(other), reasoning=None, calls=[]), "stop")
        # Without tools it is text, and special tokens are none.
        shown = "".join(piece for piece in pieces if piece not in special)
        message, reason = ask("call")
        assert (message["content"], message["calls"], reason) == (shown, [], "stop")
        message, reason = ask("call", tools=TOOLS, tool_choice="none")
        assert (message["content"], message["calls"], reason) == (shown, [], "stop")
        # Forced, the same model has to leave its script for the other function.
        message, reason = ask("text", tools=TOOLS, tool_choice=NAMED, max_tokens=200)
        assert [call["name"] for call in message["calls"]] == ["add"], (message, reason)


def test_thoughts_are_apart_from_the_answer(start_server, tmp_path):
    thought = ["<think>", "\nIs it ", "cold?\n", "</think>", "\n\n"]
    write_model(tmp_path / "m", {"answer": [*thought, "It ", "is."]}, ["<think>", "</think>"])
    server = start_server("--model-id", str(tmp_path / "m"), "--served-model-name", "m")
    with openai.OpenAI(base_url=f"{server.base}/v1", api_key="EMPTY", max_retries=0, timeout=60) as client:
        for extra, reasoning in (({}, "Is it cold?"), ({"include_reasoning": False}, None)):
            arguments = dict(model="m", messages=ASK, temperature=0, extra_body={"chat_template_kwargs": {"say": "answer"}, **extra})
            reply = client.chat.completions.create(**arguments)
            message = plain(reply.choices[0].message)
            assert message == dict(content="It is.", reasoning=reasoning, calls=[])
            assert put_together(list(client.chat.completions.create(**arguments, stream=True)))[0] == message


def test_a_conversation_with_calls_goes_on(client):
    first = client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=100,
                                           parallel_tool_calls=False)
    message = first.choices[0].message
    call = message.tool_calls[0]
    messages = [*ASK, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "12 C"}]
    reply = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=40, temperature=0)
    check_reply(reply.to_dict())
    assert reply.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("extra, param", [
    (dict(tools=[{"type": "function", "function": {"name": "no spaces"}}]), "tools[0].function.name"),
    (dict(tools=[*TOOLS, TOOLS[0]]), "tools[2].function.name"),
    (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "nobody"}}), "tool_choice.function.name"),
    (dict(tool_choice="required"), "tool_choice"),
    (dict(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"}), "response_format"),
    (dict(functions=[{"name": "a"}]), "functions"),
    (dict(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
])
def test_what_is_wrong_is_named(demo, extra, param):
    answer = demo.http.post("/v1/chat/completions", json=dict(model="demo", messages=ASK) | extra)
    assert answer.status_code == 400
    assert check_error(answer.json())["param"] == param
