"""What a client and the server said to each other, checked against the published schema of its route."""

import base64
import json
import struct

from dialects import (
    check_anthropic_error, check_message, check_message_stream, check_response, check_response_stream, named_events)
from tee import Exchange
from wire import Stream, check_error, check_reply, check_schema

GENERATION = ("/v1/completions", "/v1/chat/completions")


def check(exchange: Exchange):
    """Fails with the exchange if its reply is not what the route's schema says."""
    try:
        _check(exchange)
    except AssertionError as error:
        raise AssertionError(f"{exchange}\nasked: {exchange.request[:2000]!r}\nanswered: {exchange.body[:2000]!r}\n{error}") from error


def _check(exchange: Exchange):
    assert "content-encoding" not in exchange.headers, "a reply that was not asked to be packed"
    assert exchange.status < 500, "no call of a client is a server's error"
    assert "x-request-id" in exchange.headers
    path = exchange.path.partition("?")[0]
    if not exchange.whole and not _is_stream(exchange):
        return
    if path.startswith("/v1/messages"):
        _check_messages(exchange, path)
    elif not path.startswith("/v1/"):
        _check_native(exchange, path)
    elif exchange.status >= 400:
        check_error(json.loads(exchange.body))
    elif path == "/v1/responses":
        _check_dialect(exchange, check_response, check_response_stream)
    elif path in GENERATION:
        _check_generation(exchange)
    elif path == "/v1/models":
        check_schema("ListModelsResponse", json.loads(exchange.body))
    elif path.startswith("/v1/models/"):
        check_schema("Model", json.loads(exchange.body))
    elif path == "/v1/embeddings":
        _check_embeddings(json.loads(exchange.request), json.loads(exchange.body))


def _check_embeddings(asked: dict, reply: dict):
    for each in reply["data"]:
        is_packed = isinstance(each["embedding"], str)
        assert is_packed == (asked.get("encoding_format") == "base64"), "packed where, and only where, that was asked for"
        if is_packed:
            packed = base64.b64decode(each["embedding"], validate=True)
            each["embedding"] = list(struct.unpack(f"<{len(packed) // 4}f", packed))
    check_schema("CreateEmbeddingResponse", reply)


def _check_native(exchange: Exchange, path: str):
    """LoRAX's and TGI's routes; `test_lorax.py` looks at each member."""
    if exchange.status >= 400:
        assert {"error", "error_type"} <= set(json.loads(exchange.body)), "what these clients make their exceptions of"
    elif path == "/" and not _is_stream(exchange):
        (reply,) = json.loads(exchange.body)
        assert isinstance(reply["generated_text"], str)
    elif _is_stream(exchange):
        events = [json.loads(line[len("data:"):]) for line in exchange.body.decode().split("\n") if line.startswith("data:")]
        assert [event["generated_text"] is None for event in events] == [True] * (len(events) - 1) + [False] * bool(events)


def _is_stream(exchange: Exchange) -> bool:
    return exchange.headers.get("content-type", "").startswith("text/event-stream")


def _check_generation(exchange: Exchange):
    asked = json.loads(exchange.request)
    assert _is_stream(exchange) == bool(asked.get("stream")), "a stream where, and only where, one was asked for"
    if not _is_stream(exchange):
        check_reply(json.loads(exchange.body))
        return
    lines = exchange.body.decode().split("\n")
    # A client that left may have left within a line.
    stream = Stream(lines[:-1])
    if exchange.whole:
        assert lines[-1] == "", f"the stream ends within a line: {lines[-1]!r}"
        stream.check_shape()
        if (asked.get("stream_options") or {}).get("include_usage"):
            assert stream.chunks[-1]["usage"]["completion_tokens"] >= 0


def _check_messages(exchange: Exchange, path: str):
    assert exchange.headers["request-id"] == exchange.headers["x-request-id"]
    if exchange.status >= 400:
        check_anthropic_error(exchange.status, json.loads(exchange.body))
    elif path == "/v1/messages/count_tokens":
        assert json.loads(exchange.body)["input_tokens"] > 0
    else:
        _check_dialect(exchange, check_message, check_message_stream)


def _check_dialect(exchange: Exchange, check_whole, check_stream):
    if not _is_stream(exchange):
        check_whole(json.loads(exchange.body))
    elif exchange.whole:
        check_stream(named_events(exchange.body.decode()))
