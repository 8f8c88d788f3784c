"""What a client and the server said to each other, checked against the published schema of its route."""

import json

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
    if not path.startswith("/v1/") or not exchange.whole and not _is_stream(exchange):
        return
    if exchange.status >= 400:
        check_error(json.loads(exchange.body))
    elif path in GENERATION:
        _check_generation(exchange)
    elif path == "/v1/models":
        check_schema("ListModelsResponse", json.loads(exchange.body))
    elif path.startswith("/v1/models/"):
        check_schema("Model", json.loads(exchange.body))
    elif path == "/v1/embeddings":
        check_schema("CreateEmbeddingResponse", json.loads(exchange.body))


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
