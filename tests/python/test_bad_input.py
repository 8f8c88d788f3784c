"""Requests that are wrong, by the table `bad_input.jsonl`: exact status, code, param and message, and nothing breaks.

A row gives the body as `raw`, `raw_hex`, `raw_repeat` ([[text, times], ..]) or as changes to a good request
(`completions`, `chat`); in changes `"$absent"` removes a field, `{"$repeat": [x, n]}` is a list of n x, `{"$text": [s, n]}` is s
n times, `{"$ids": n}` is {"0": 1, ..}. Expected texts may hold `...` for anything; `"ANY"` is any code or param.
"""

import json
import re
import socket
import time
from pathlib import Path

import pytest

from wire import check_error, complete

CASES = [json.loads(line) for line in (Path(__file__).parent / "bad_input.jsonl").read_text().splitlines()]
BATCH = 20
GOOD = dict(model="sql", prompt="Tell me about the sea.\n", temperature=0, max_tokens=24, logprobs=1)
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error", 405: "invalid_request_error",
         413: "invalid_request_error", 415: "invalid_request_error", 422: "invalid_request_error"}


def expand(value):
    if isinstance(value, dict):
        if "$repeat" in value:
            item, times = value["$repeat"]
            return [item] * times
        if "$text" in value:
            text, times = value["$text"]
            return text * times
        if "$ids" in value:
            return {str(i): 1 for i in range(value["$ids"])}
    return value


def body_of(case: dict) -> bytes:
    if "raw" in case:
        return case["raw"].encode()
    if "raw_hex" in case:
        return bytes.fromhex(case["raw_hex"])
    if "raw_repeat" in case:
        return "".join(text * times for text, times in case["raw_repeat"]).encode()
    if "chat" in case:
        good = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    else:
        good = {"model": "demo", "prompt": "Hello!\n", "max_tokens": 4}
    changed = {**good, **{k: expand(v) for k, v in (case.get("chat") or case.get("completions") or {}).items()}}
    return json.dumps({k: v for k, v in changed.items() if v != "$absent"}).encode()


def matches(pattern, text) -> bool:
    if pattern is None or text is None:
        return pattern == text
    if pattern == "ANY":
        return True
    return re.fullmatch(".*".join(map(re.escape, pattern.split("..."))), text, re.S) is not None


def send(http, case: dict):
    path = case.get("path") or ("/v1/chat/completions" if "chat" in case else "/v1/completions")
    headers = {"content-type": "application/json", **case.get("headers", {})}
    method = case.get("method", "POST")
    return http.request(method, path, content=b"" if method in ("GET", "DELETE") else body_of(case), headers=headers)


def complaints(case: dict, answer) -> list[str]:
    found = []
    if answer.status_code != case["status"]:
        found.append(f"status {answer.status_code}, not {case['status']}")
    try:
        error = check_error(answer.json())
    except (ValueError, AssertionError, KeyError) as problem:
        return [*found, f"no envelope: {str(problem)[:200]}; body {answer.text[:300]!r}"]
    for member in ("code", "param", "message"):
        if not matches(case[member], error[member]):
            found.append(f"{member} {error[member]!r:.300}, not {case[member]!r}")
    if error["type"] != TYPES[case["status"]]:
        found.append(f"type {error['type']!r}")
    if error["retryable"]:
        found.append("retryable")
    if error["request_id"] != answer.headers.get("x-request-id"):
        found.append("request_id differs from the header")
    if len(error["message"]) > 600:
        found.append(f"a message of {len(error['message'])} characters")
    return found


@pytest.fixture(scope="module")
def good_reply(demo):
    return complete(demo.http, **GOOD)["choices"]


@pytest.mark.parametrize("first", range(0, len(CASES), BATCH))
def test_bad_requests_get_their_row_and_harm_nothing(demo, good_reply, first):
    found = []
    for case in CASES[first:first + BATCH]:
        found += [f"{case['name']}: {complaint}" for complaint in complaints(case, send(demo.http, case))]
    assert not found, f"{len(found)} complaints:\n" + "\n".join(found)
    assert complete(demo.http, **GOOD)["choices"] == good_reply


def test_method_not_allowed_says_what_is_allowed(demo):
    answer = demo.http.get("/v1/completions")
    assert answer.status_code == 405 and "POST" in answer.headers["allow"]


def test_a_body_that_is_announced_too_long_is_refused_before_it_is_sent(demo):
    host, port = demo.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"content-length: 99999999999\r\n\r\n{")
        started = time.monotonic()
        answer = connection.recv(65536)
        assert b" 413 " in answer.split(b"\r\n", 1)[0], answer[:200]
        assert time.monotonic() - started < 5


def test_a_chunked_body_over_the_limit_is_refused(demo):
    def pieces():
        for _ in range(80):
            yield b" " * 65536
    answer = demo.http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert check_error(answer.json())["code"] == "body_too_large"


def test_edges_that_are_allowed_are_accepted(demo):
    """The other side of the table's bounds."""
    edges = [
        {"temperature": 0}, {"temperature": 1e9, "seed": 1}, {"top_p": 0}, {"top_p": 1}, {"presence_penalty": -2}, {"presence_penalty": 2},
        {"frequency_penalty": 2}, {"top_k": -1}, {"top_k": 0}, {"top_k": 2048}, {"min_p": 0}, {"min_p": 1}, {"repetition_penalty": 10},
        {"n": 8}, {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"stop": ["x"] * 16}, {"stop": "a" * 256}, {"logprobs": 20}, {"logprobs": 0},
        {"stop_token_ids": [2047] * 256}, {"logit_bias": {"2047": 100, "0": -100}}, {"logit_bias": {str(i): 0 for i in range(1024)}},
        {"adapter_scale": 8}, {"adapter_scale": -8}, {"priority": 100}, {"priority": -100}, {"max_tokens": 4.0}, {"min_tokens": 4},
        {"prompt": ["Hello!\n"] * 256, "max_tokens": 1}, {"prompt": [5] * 2040, "max_tokens": 8}, {"suffix": ""}, {"best_of": 2, "n": 1, "temperature": 1},
        {"prompt": "\u2028 \u0000 \U0001f30a <|im_end|>"}, {"truncate_prompt_tokens": 1}, {"truncate_prompt_tokens": -1},
    ]
    for edge in edges:
        complete(demo.http, **{"model": "sql", "prompt": "Hello!\n", "max_tokens": 4, **edge})


def test_special_tokens_in_user_text_are_text(demo):
    """`<|im_end|>` in a message must not end the message."""
    ids = demo.http.post("/tokenize", json={"model": "demo", "messages": [{"role": "user", "content": "a<|im_end|>b"}]}).json()["tokens"]
    plain = demo.http.post("/tokenize", json={"model": "demo", "messages": [{"role": "user", "content": "ab"}]}).json()["tokens"]
    special = [i for i in range(3)]
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
