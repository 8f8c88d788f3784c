"""Many streams, clients that leave, full queues and deadlines."""

import asyncio
import json
import re
import time

import httpx
import pytest

from background import LONG, Background
from loramux_server import wait_until
from raw_http import raw_connection
from wire import Stream, check_error, complete, post_stream, sse_lines


# ---- cancel

def test_leaving_frees_everything_at_once(demo):
    demo.wait_idle()
    background = Background(demo).wait_running()
    wait_until(lambda: demo.metric("vllm:num_requests_running") == 1, "it is counted")
    background.stop()
    started = time.monotonic()
    demo.wait_idle(2)
    assert time.monotonic() - started < 1.0, "a step is milliseconds"


def test_leaving_at_any_moment_leaks_nothing(start_server):
    """Disconnects before the request, in the queue, in the prefill, in the first tokens; then no block may be in use."""
    server = start_server("--max-num-seqs", "4", "--prefix-caching", "false")
    empty = server.metric("vllm:kv_cache_usage_perc")
    body = json.dumps({**LONG, "prompt": "the sea and the moon " * 60, "max_tokens": 900, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    for round_number in range(24):
        with raw_connection(server) as connection:
            is_whole = round_number % 6 != 0
            connection.sendall(head + (body if is_whole else body[:20]))
            for _ in range(round_number % 5 if is_whole else 0):
                connection.recv(1 + round_number * 50)
    server.wait_idle(15)
    assert server.metric("vllm:kv_cache_usage_perc") == empty == 0
    complete(server.http, model="sql", prompt="Hello!\n", max_tokens=4)


def test_leaving_while_not_streaming_cancels_too(start_server, slow_flags):
    server = start_server(*slow_flags)
    with httpx.Client(base_url=server.base, timeout=httpx.Timeout(5, read=0.3), trust_env=False) as impatient:
        with pytest.raises(httpx.ReadTimeout):
            impatient.post("/v1/completions", json={**LONG, "n": 4})
    server.wait_idle(2)


# ---- overload and deadlines

def test_a_full_queue_says_429_with_a_time_to_retry(start_server, slow_flags):
    server = start_server(*slow_flags, "--max-num-seqs", "1", "--max-queued-requests", "2")
    background = [Background(server).wait_running()]
    for waiting in (1, 2):
        background.append(Background(server))
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == waiting, f"{waiting} waiting")
    started = time.monotonic()
    answer = server.http.post("/v1/completions", json=LONG)
    assert time.monotonic() - started < 1
    error = check_error(answer.json())
    assert answer.status_code == 429 and error["code"] == "queue_full" and error["type"] == "rate_limit_error" and error["retryable"]
    assert re.fullmatch(r"[1-9]\d*", answer.headers["retry-after"])
    assert "--max-queued-requests" in error["message"] and "2" in error["message"]
    wait_until(lambda: server.metrics().get("loramux_rejected_total"), "the refusal is counted")
    background[0].stop()
    background[1].wait_running().stop()
    background[2].wait_running().stop()
    complete(server.http, model="demo", prompt="x", max_tokens=1)


def test_a_deadline_is_504_before_the_first_token_and_an_event_after(start_server, slow_flags):
    server = start_server(*slow_flags)
    answer = server.http.post("/v1/completions", json=LONG, headers={"x-request-timeout": "0.25"})
    error = check_error(answer.json())
    assert answer.status_code == 504 and error["code"] == "deadline_exceeded" and error["retryable"]
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers={"x-request-timeout": "0.25"}) as answer:
        stream = Stream(sse_lines(answer))
    assert stream.error["code"] == "deadline_exceeded" and not stream.done and stream.chunks
    server.wait_idle(2)
    capped = start_server(*slow_flags, "--request-timeout", "300ms")
    answer = capped.http.post("/v1/completions", json=LONG, headers={"x-request-timeout": "60"})
    assert answer.status_code in (400, 504), "the server's own limit stands"


def test_more_streams_than_fit_at_once_all_end(start_server):
    """A small arena: requests wait, are preempted and go on; each gets what it gets alone."""
    server = start_server("--arena-bytes", "24MiB", "--max-num-seqs", "16")
    def body(i: int) -> dict:
        return dict(model=["demo", "pirate", "sql"][i % 3], prompt="the sea " * (20 * (i % 5 + 1)), temperature=0, max_tokens=200 + i * 10,
                    ignore_eos=True, return_token_ids=True)
    alone = [complete(server.http, **body(i))["choices"][0]["token_ids"] for i in range(24)]

    async def all_at_once():
        async with httpx.AsyncClient(base_url=server.base, timeout=120, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body(i)) for i in range(24)))
            return [answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text for answer in answers]

    assert asyncio.run(all_at_once()) == alone


# ---- many streams

def test_100_streams_end_well_and_leave_nothing(demo):
    async def run():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=demo.base, timeout=120, limits=limits, trust_env=False) as client:
            async def one(i):
                async with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 20 + i % 10, "stream": True}) as answer:
                    return (await answer.aread()).endswith(b"data: [DONE]\n\n")
            return await asyncio.gather(*(one(i) for i in range(100)))
    assert all(asyncio.run(run()))
    demo.wait_idle()


def test_a_stream_of_a_second_sampled_choice_is_its_own(demo):
    stream = post_stream(demo.http, "/v1/completions", model="demo", prompt="Once upon a time", n=2, temperature=1.3, seed=4, max_tokens=30)
    assert stream.text(0) != stream.text(1)
