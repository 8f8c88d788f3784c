"""Replies and streams as they are on the wire, checked against OpenAI's published schema."""

import copy
import json
import re
from pathlib import Path

import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

_DOCUMENT = json.loads((Path(__file__).parent / "schemas/openai.json").read_text())


def _nullable(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


def _completion_chunk_schema() -> dict:
    """OpenAI publishes one schema for a completion and its chunks, but sends null in chunks; so do we."""
    chunk = copy.deepcopy(_DOCUMENT["components"]["schemas"]["CreateCompletionResponse"])
    choice = chunk["properties"]["choices"]["items"]["properties"]
    choice["finish_reason"] = _nullable(choice["finish_reason"])
    chunk["properties"]["usage"] = _nullable(chunk["properties"]["usage"])
    return chunk


def _completion_schema() -> dict:
    """With `echo` the first token has no logprob: OpenAI's replies say null where its schema says number."""
    schemas = _DOCUMENT["components"]["schemas"]
    logprobs = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]["logprobs"]
    for option in logprobs["anyOf"]:
        for member in ("token_logprobs", "top_logprobs"):
            if member in option.get("properties", {}):
                option["properties"][member]["items"] = _nullable(option["properties"][member]["items"])
    return schemas["CreateCompletionResponse"]


_completion_schema()
_DOCUMENT["components"]["schemas"]["CompletionChunk"] = _completion_chunk_schema()
_REGISTRY = Registry().with_resource("urn:openai", Resource(contents=_DOCUMENT, specification=DRAFT202012))


def _validator(name: str):
    return jsonschema.Draft202012Validator({"$ref": f"urn:openai#/components/schemas/{name}"}, registry=_REGISTRY)


_VALIDATORS = {name: _validator(name) for name in (
    "CreateCompletionResponse", "CompletionChunk", "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse", "CreateEmbeddingResponse", "ErrorResponse", "ListModelsResponse", "Model")}

# Members that may be null; any other null is a member that should be absent.
_NULL_ALLOWED = {"logprobs", "finish_reason", "content", "refusal", "usage", "param", "code", "bytes"}


def check_schema(name: str, value):
    errors = sorted(_VALIDATORS[name].iter_errors(value), key=lambda e: list(e.path))
    assert not errors, f"{name}: {'; '.join(f'{list(e.path)}: {e.message}' for e in errors[:5])}\n{json.dumps(value)[:2000]}"


def check_no_stray_null(value, path="$"):
    if isinstance(value, dict):
        for key, member in value.items():
            assert member is not None or key in _NULL_ALLOWED, f"{path}.{key} is null; it should be absent"
            check_no_stray_null(member, f"{path}.{key}")
    elif isinstance(value, list):
        for index, member in enumerate(value):
            if not path.endswith(("token_logprobs", "top_logprobs", "prompt_logprobs")):
                assert member is not None, f"{path}[{index}] is null"
            check_no_stray_null(member, f"{path}[{index}]")


_IDS = {"text_completion": r"cmpl-[0-9a-f]{32}", "chat.completion": r"chatcmpl-[0-9a-f]{32}",
        "chat.completion.chunk": r"chatcmpl-[0-9a-f]{32}"}


def check_reply(reply: dict, chunk: bool = False) -> dict:
    """A completion, chat completion or chunk: schema, id, fingerprint, no stray null. Gives it back."""
    kind = reply.get("object")
    name = {"text_completion": "CompletionChunk" if chunk else "CreateCompletionResponse",
            "chat.completion": "CreateChatCompletionResponse",
            "chat.completion.chunk": "CreateChatCompletionStreamResponse"}.get(kind)
    assert name, f"unknown object {kind!r}: {json.dumps(reply)[:500]}"
    check_schema(name, reply)
    check_no_stray_null(reply)
    assert re.fullmatch(_IDS[kind], reply["id"]), reply["id"]
    assert re.fullmatch(r"loramux-\d+\.\d+\.\d+-[0-9a-f]{8}", reply["system_fingerprint"]), reply["system_fingerprint"]
    return reply


def check_error(body: dict) -> dict:
    """The envelope that every error has. Gives back what is inside `error`."""
    check_schema("ErrorResponse", body)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code", "retryable", "request_id"}, sorted(error)
    assert isinstance(error["code"], (str, type(None))), error
    assert isinstance(error["retryable"], bool), error
    assert error["message"] and isinstance(error["request_id"], str) and error["request_id"], error
    return error


def sse_lines(answer):
    """Lines of a streamed reply. Only LF ends one: text may hold other separators that `iter_lines` would split at."""
    rest = b""
    for piece in answer.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in lines)
    assert rest == b"", f"the stream ends within a line: {rest!r}"


async def async_sse_lines(answer):
    """As `sse_lines`, for an asynchronous client."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()
    assert rest == b"", f"the stream ends within a line: {rest!r}"


class Stream:
    """An SSE reply, read to its end: only data lines, blank lines and comments are allowed."""

    def __init__(self, lines):
        self.chunks, self.error, self.done = [], None, False
        for line in lines:
            assert line == "" or line.startswith(("data: ", ":")), f"not an SSE data line: {line!r}"
            if not line.startswith("data: "):
                continue
            assert not self.done, f"after [DONE]: {line!r}"
            assert self.error is None, f"after an error: {line!r}"
            self._event(line.removeprefix("data: "))

    def _event(self, data: str):
        if data == "[DONE]":
            self.done = True
            return
        value = json.loads(data)
        if "error" in value:
            self.error = check_error(value)
        else:
            self.chunks.append(check_reply(value, chunk=True))

    def check_shape(self):
        """One id, finish_reason once and last for each index, `[DONE]` at the end."""
        assert self.error is None, self.error
        assert self.done, "no [DONE]"
        assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in self.chunks}) == 1
        finished = {}
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                index = choice["index"]
                assert index not in finished, f"index {index} goes on after its finish_reason"
                if choice["finish_reason"] is not None:
                    finished[index] = choice["finish_reason"]
        return self

    def choices(self, index: int = 0) -> list[dict]:
        return [choice for chunk in self.chunks for choice in chunk["choices"] if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in self.choices(index))

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for choice in self.choices(index) for token in choice.get("token_ids") or []]

    def finish_reason(self, index: int = 0):
        reasons = [c["finish_reason"] for c in self.choices(index) if c["finish_reason"] is not None]
        assert len(reasons) == 1, reasons
        return reasons[0]


def post(http, path: str, **body) -> dict:
    """POSTs and expects 200 and a valid reply."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
    return check_reply(answer.json())


def post_stream(http, path: str, **body) -> Stream:
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise AssertionError(f"{answer.status_code} {answer.read().decode()}")
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
        return Stream(sse_lines(answer)).check_shape()


def complete(http, **body) -> dict:
    return post(http, "/v1/completions", **body)


def chat(http, content: str, **body) -> dict:
    return post(http, "/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
