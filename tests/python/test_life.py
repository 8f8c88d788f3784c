"""Start, overload, cancel, drain, stop: what an operator and an orchestrator rely on."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapter_files import write_random_adapter
from loramux_server import REPOSITORY, Server, children, run_to_end, wait_until
from wire import Stream, chat, check_error, complete, post_stream, sse_lines

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
LONG = dict(model="demo", prompt="Once upon a time", temperature=0, max_tokens=1900, ignore_eos=True)


class Background:
    """A long stream in a thread. `events` counts what has arrived; `stop` closes the connection."""

    def __init__(self, server: Server, **changes):
        self.events, self.stream, self.failure, self.status = 0, None, None, None
        self._client = httpx.Client(base_url=server.base, timeout=120, headers=server.headers, trust_env=False)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=({**LONG, **changes, "stream": True},), daemon=True)
        self._thread.start()

    def _run(self, body: dict):
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as answer:
                self.status = answer.status_code
                if answer.status_code != 200:
                    self.failure = check_error(json.loads(answer.read()))
                    return
                self.stream = Stream(self._lines(answer))
        except (httpx.HTTPError, AssertionError) as error:
            self.failure = error

    def _lines(self, answer):
        for line in sse_lines(answer):
            self.events += line.startswith("data: ")
            yield line
            if self._stopped.is_set():
                answer.close()
                return

    def wait_running(self):
        wait_until(lambda: self.events > 3 or self.failure, "the stream runs")
        assert not self.failure, self.failure
        return self

    def stop(self):
        self._stopped.set()
        self._thread.join(30)

    def result(self, timeout_s: float = 60) -> Stream:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the stream has not ended"
        assert self.failure is None, self.failure
        return self.stream


def raw_connection(server: Server) -> socket.socket:
    host, port = server.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not piece:
            return received
        received += piece


def http_head(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found, answer[:300]
    return int(found[1])


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


# ---- stop

def test_sigterm_lets_running_streams_finish_and_takes_no_new_ones(start_server, slow_flags):
    server = start_server(*slow_flags)
    background = Background(server, max_tokens=600).wait_running()
    server.terminate()
    def refused():
        try:
            answer = server.http.post("/v1/completions", json={**LONG, "max_tokens": 1})
        except httpx.TransportError:
            return True
        if answer.status_code != 503:
            return False
        error = check_error(answer.json())
        assert error["code"] == "draining" and error["retryable"] and int(answer.headers["retry-after"]) >= 1
        return True
    wait_until(refused, "new requests are refused", 5)
    assert not server.is_healthy()
    stream = background.result().check_shape()
    assert stream.finish_reason() == "length"
    assert server.wait_exit(10) == 0
    assert children(server.pid) == []


def test_sigterm_without_work_ends_at_once(start_server):
    server = start_server()
    shard = server.shard_pid()
    complete(server.http, model="sql", prompt="x", max_tokens=1)
    started = time.monotonic()
    server.terminate()
    assert server.wait_exit(10) == 0
    assert time.monotonic() - started < 5
    wait_until(lambda: not is_running(shard), "the shard ends with its server", 5)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_drain_timeout_ends_what_still_runs_with_an_error(start_server, slow_flags):
    server = start_server(*slow_flags, "--drain-timeout", "500ms")
    background = [Background(server, n=4).wait_running() for _ in range(3)]
    started = time.monotonic()
    server.terminate()
    assert server.wait_exit(15) == 0
    assert time.monotonic() - started < 5
    for one in background:
        one._thread.join(10)
        assert one.failure or one.stream.error or one.stream.done
        if one.stream and one.stream.error:
            assert one.stream.error["code"] == "draining" and not one.stream.done


def test_a_second_sigterm_ends_now(start_server, slow_flags):
    server = start_server(*slow_flags, "--drain-timeout", "60s")
    shard = server.shard_pid()
    Background(server, n=8).wait_running()
    server.terminate()
    wait_until(lambda: not server.is_healthy(), "the drain begins", 5)
    assert server.process.poll() is None
    started = time.monotonic()
    server.terminate()
    assert server.wait_exit(5) != 0
    assert time.monotonic() - started < 2
    wait_until(lambda: not is_running(shard), "the shard ends too", 5)


def test_the_shard_ends_when_the_server_is_killed(start_server):
    server = start_server()
    shard = server.shard_pid()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not is_running(shard), "no shard is left behind", 5)


def test_a_client_that_stops_reading_is_cancelled(start_server, slow_flags):
    """16 choices of a long stream fill every buffer; after 10 s without a read the request goes."""
    server = start_server(*slow_flags, "--max-n", "16")
    body = json.dumps({**LONG, "n": 16, "logprobs": 20, "stream": True}).encode()
    with raw_connection(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.metric("vllm:num_requests_running") > 0, "it runs")
        wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "it is cancelled", 40)
        assert server.metric("loramux_stream_stalls_total") == 1


# ---- start

def test_a_port_in_use_is_said_with_what_to_do(demo, data_dir):
    port = demo.address.rsplit(":", 1)[1]
    ended = run_to_end("--port", port, "--data-dir", data_dir)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr and "--port" in ended.stderr and "panicked" not in ended.stderr


@pytest.mark.parametrize("path, words", [("/no/such/model", ["--model-id", "/no/such/model"]), ("", ["config.json"])])
def test_a_wrong_model_path_is_said_with_what_to_give(tmp_path, path, words):
    ended = run_to_end("--port", "0", "--model-id", path or str(tmp_path))
    assert ended.returncode == 1
    for word in words:
        assert word in ended.stderr, ended.stderr
    assert "panicked" not in ended.stderr and len(ended.stderr) < 2000


def test_a_broken_model_is_said_by_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    ended = run_to_end("--port", "0", "--model-id", str(tmp_path))
    assert ended.returncode == 1 and "config.json" in ended.stderr and "panicked" not in ended.stderr


def test_an_unsupported_model_is_said_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MODEL_CONFIG, "model_type": "resnet"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((REPOSITORY / "models/demo/base" / name).read_bytes())
    ended = run_to_end("--port", "0", "--model-id", str(tmp_path))
    assert ended.returncode == 1 and "resnet" in ended.stderr and "llama" in ended.stderr


def test_help_and_version():
    shown = run_to_end("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    for flag in ("--model-id", "--adapter", "--adapter-dir", "--port", "--api-key", "--max-num-seqs", "--arena-bytes", "--drain-timeout"):
        assert flag in shown.stdout, flag
    assert "curl" in shown.stdout
    assert not re.search(r"^  shard\b", shown.stdout, re.M), "the internal command is hidden"
    version = run_to_end("--version")
    expected = re.search(r'^version = "(.+?)"', (REPOSITORY / "Cargo.toml").read_text(), re.M)[1]
    assert version.stdout.strip() == f"loramux {expected}"


@pytest.mark.parametrize("flags, word", [(["--prot", "1"], "--port"), (["--port", "70000"], "--port"), (["--adapter", "x"], "NAME=REF"),
                                         (["--adapter-dir", "/no/such"], "/no/such"), (["--max-num-seqs", "0"], "max-num-seqs"),
                                         (["--dtype", "int3"], "--dtype"), (["--arena-bytes", "4 parsecs"], "KiB"),
                                         (["--host", "256.1.1.1"], "256.1.1.1"), (["--device", "tpu"], "tpu")])
def test_a_wrong_flag_is_said_by_name(flags, word, data_dir):
    ended = run_to_end(*flags, "--data-dir", data_dir)
    assert ended.returncode != 0 and word in ended.stderr, ended.stderr
    assert "panicked" not in ended.stderr


def test_every_flag_is_an_environment_variable_too(start_server):
    server = start_server(env={"LORAMUX_SERVED_MODEL_NAME": "mine,also-mine", "LORAMUX_MAX_N": "2"})
    assert complete(server.http, model="also-mine", prompt="x", max_tokens=1)["model"] == "also-mine"
    assert server.http.post("/v1/completions", json={"model": "mine", "prompt": "x", "n": 3}).status_code == 400


def test_in_process_mode_serves_the_same(start_server, demo):
    server = start_server("--shard-mode", "in-process")
    assert children(server.pid) == []
    body = dict(prompt="Tell me about the sea.\n", temperature=0, max_tokens=24, return_token_ids=True)
    for model in ("demo", "haiku"):
        assert (complete(server.http, model=model, **body)["choices"][0]["token_ids"]
                == complete(demo.http, model=model, **body)["choices"][0]["token_ids"])


def test_the_limit_of_composed_adapters_is_the_flags(start_server):
    server = start_server("--max-composed-adapters", "2")
    def answer(count: int):
        parts = [{"adapter": name, "weight": 0.1} for name in ("pirate", "haiku", "sql")[:count]]
        return server.http.post("/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 1, "compose": parts})
    assert answer(2).status_code == 200
    assert answer(3).status_code == 400 and check_error(answer(3).json())["message"].endswith("allows 2 (--max-composed-adapters)")


# ---- keys

def test_without_the_key_every_route_but_health_and_metrics_is_401(start_server):
    server = start_server(api_key="a-key")
    routes = [("GET", "/v1/models"), ("GET", "/v1/models/demo"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
              ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/version"), ("GET", "/load"), ("POST", "/v1/embeddings"),
              ("GET", "/v1/nothing"), ("GET", "/health/../v1/models"), ("GET", "//v1/models"), ("PUT", "/v1/completions")]
    with httpx.Client(base_url=server.base, trust_env=False) as stranger:
        wrong = [{"authorization": "Bearer wrong"}, {"authorization": "Bearer a-key2"}, {"authorization": "Bearer a-ke"},
                 {"authorization": "Basic YS1rZXk="}, {"authorization": "Bearer"}]
        for nth, headers in enumerate([{}, {"host": "localhost"}, *wrong]):
            # An address may send 30 wrong keys a minute; a request without any is no guess.
            for method, path in routes if nth < 2 else routes[nth % 3::3]:
                answer = stranger.request(method, path, headers=headers, json={} if method != "GET" else None)
                assert answer.status_code == 401, (method, path, headers, answer.status_code)
                error = check_error(answer.json())
                assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
                assert answer.headers["www-authenticate"].startswith("Bearer")
        for path in ("/health", "/ping", "/", "/health/live", "/health/ready", "/health/startup", "/metrics"):
            assert stranger.get(path).status_code == 200, path
    assert complete(server.http, model="demo", prompt="x", max_tokens=1)
    assert "a-key" not in server.log()


def test_what_callers_send_is_in_no_log_and_no_metric(start_server):
    server = start_server("--log-level", "debug", api_key="canary-key")
    secrets = ["canary-key", "canary-prompt", "canary-stop", "canary-token", "canary-wrong-key", "canary-user"]
    body = dict(model="sql", prompt="canary-prompt", stop="canary-stop", api_token="canary-token", user="canary-user", max_tokens=2)
    complete(server.http, **body)
    post_stream(server.http, "/v1/completions", **body)
    chat(server.http, "canary-prompt", model="demo", max_tokens=2)
    for headers, change in (({"authorization": "Bearer canary-wrong-key"}, {}), ({"x-adapter-token": "canary-token"}, {"temperature": -1}),
                            ({}, {"stop": ["canary-stop" * 30]}), ({"x-request-timeout": "0.000001"}, {"prompt": "canary-prompt " * 200})):
        answer = server.http.post("/v1/completions", json={**body, **change}, headers=headers)
        assert answer.status_code in (400, 401, 504)
        assert "canary" not in answer.text
    told = server.log() + server.http.get("/metrics").text
    assert not [secret for secret in secrets if secret in told]


# ---- connections

def test_a_header_that_never_ends_is_cut_off(demo):
    with raw_connection(demo) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow:")
        started = time.monotonic()
        answer = read_to_end(connection)
        assert 3 < time.monotonic() - started < 12
        assert answer == b"" or http_head(answer) == 408


def test_an_idle_connection_is_not_a_slow_header(demo):
    """Clients keep connections; only a header that was begun has to come soon."""
    with raw_connection(demo) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert http_head(connection.recv(65536)) == 200
            connection.settimeout(6.5)
            with pytest.raises(TimeoutError):
                assert connection.recv(1) != b"", "closed after less than 6.5 s"
            connection.settimeout(20)


@pytest.mark.parametrize("head", [b"x-big: " + b"a" * 102_400, b"\r\n".join(b"x-%d: a" % i for i in range(150)), b"x-big: " + b"a" * 1_000_000],
                         ids=["one-of-100-KiB", "150-headers", "without-end"])
def test_headers_that_are_too_large_are_431(demo, head):
    with raw_connection(demo) as connection:
        try:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent
        answer = read_to_end(connection)
    assert http_head(answer) == 431
    body = answer.split(b"\r\n\r\n", 1)[1]
    # Beyond twice the limit the HTTP library answers before our code sees the request, and sends no body.
    assert len(head) > 200_000 and body == b"" or check_error(json.loads(body))["code"] == "headers_too_large"


@pytest.mark.parametrize("path, status", [("/v1/nothing", 404), ("/v1/models", 405), ("/health", 405)])
def test_a_refusal_before_the_body_came_says_whether_the_connection_goes_on(demo, path, status):
    """Clients send the body in a packet of its own, and use the connection again unless they are told not to."""
    for _ in range(20):
        with raw_connection(demo) as connection:
            connection.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n" % path.encode())
            answer = connection.recv(65536)
            assert http_head(answer) == status
            if b"\r\nconnection: close\r\n" in answer.lower():
                continue
            with contextlib.suppress(OSError):
                connection.sendall(b"{}GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            try:
                second = connection.recv(65536)
            except ConnectionResetError:
                second = b""
            assert second, "closed without `connection: close`"
            assert http_head(second) == 200


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 64, b"GET / HTTP/9.9\r\n\r\n",
                                     b"GET /health HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"],
                         ids=["tls-hello", "no-version", "zeros", "http-9.9", "two-lengths"])
def test_what_is_not_http_harms_nothing(demo, garbage):
    with raw_connection(demo) as connection:
        connection.sendall(garbage)
        with contextlib.suppress(OSError):  # already closed by the other side
            connection.shutdown(socket.SHUT_WR)
        answer = read_to_end(connection)
        assert answer == b"" or http_head(answer) == 400, answer[:200]
    assert demo.is_healthy()


def test_200_idle_and_half_open_connections_do_not_disturb(demo):
    connections = [raw_connection(demo) for _ in range(200)]
    try:
        for connection in connections[::2]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        started = time.monotonic()
        complete(demo.http, model="sql", prompt="Hello!\n", max_tokens=8)
        assert time.monotonic() - started < 5
    finally:
        for connection in connections:
            connection.close()


# ---- service routes

def test_metrics_parse_and_have_their_names(demo):
    complete(demo.http, model="sql", prompt="Hello!\n", max_tokens=4)
    answer = demo.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    gauges = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
    counters = ["prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "request_success"]
    histograms = ["time_to_first_token_seconds", "e2e_request_latency_seconds"]
    for kind, names in (("gauge", gauges), ("counter", counters), ("histogram", histograms)):
        for name in names:
            assert families[f"vllm:{name}"].type == kind, name
    for name in gauges:
        samples = families[f"vllm:{name}"].samples
        assert len(samples) == 1 and samples[0].labels["model_name"] == "demo" and samples[0].labels["engine"] == "0"
    lora = families["vllm:lora_requests_info"].samples
    assert len(lora) == 1 and set(lora[0].labels) >= {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert int(lora[0].labels["max_lora"]) > 0
    for name in ("loramux_shard_restarts", "loramux_rejected", "loramux_adapter_requests", "loramux_arena_pages", "loramux_build_info"):
        assert name in families or name.removesuffix("_info") in families, name
    for family in families.values():
        assert family.documentation, family.name
        if family.name.startswith("vllm:"):
            assert all("adapter" not in sample.labels for sample in family.samples)


def test_counters_count(demo):
    demo.wait_idle()
    time.sleep(0.2)  # the page is made at most every 50 ms
    before = demo.metrics()
    usage = complete(demo.http, model="pirate", prompt="Hello!\n", max_tokens=7, ignore_eos=True)["usage"]
    def moved(name):
        return demo.metric(name) - before[name]
    wait_until(lambda: moved("vllm:generation_tokens_total") >= 7 and moved("vllm:request_success_total") >= 1, "tokens are counted", 5)
    assert moved("vllm:generation_tokens_total") == 7
    assert moved("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert moved("vllm:request_success_total") == 1


def test_a_thousand_names_do_not_make_a_thousand_series(demo):
    for i in range(1000):
        demo.http.post("/v1/completions", json={"model": f"stranger-{i}", "prompt": "x"})
    text = demo.http.get("/metrics").text
    assert "stranger" not in text and len(text) < 65536


def test_tokenize_and_detokenize_are_a_round_trip(demo):
    for text in ("Tell me about the sea.", "  two  spaces\n\ttab", "naïve 🌊 日本語", "<|im_end|>", ""):
        tokens = demo.http.post("/tokenize", json={"model": "demo", "prompt": text, "add_special_tokens": False}).json()
        assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
        assert demo.http.post("/detokenize", json={"model": "demo", "tokens": tokens["tokens"]}).json() == {"prompt": text}
    by_chat = demo.http.post("/tokenize", json={"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}).json()
    assert by_chat["count"] == chat(demo.http, "Hello!", model="demo", max_tokens=1)["usage"]["prompt_tokens"]
    strings = demo.http.post("/tokenize", json={"model": "demo", "prompt": "the sea", "return_token_strs": True}).json()
    assert len(strings["token_strs"]) == strings["count"]


def test_version_load_and_ping(demo):
    assert re.fullmatch(r"\d+\.\d+\.\d+", demo.http.get("/version").json()["version"])
    assert demo.http.get("/load").json()["server_load"] >= 0
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("GET", "/"), ("GET", "/health"), ("GET", "/startup"), ("GET", "/health/ready")):
        answer = demo.http.request(method, path)
        assert answer.status_code == 200, path
    assert demo.http.get("/health").content == b""


def test_http2_carries_many_streams_on_one_connection(demo):
    """Prior knowledge, as gateways speak it. One stream is left early; the others go on."""
    async def run():
        async with httpx.AsyncClient(base_url=demo.base, http1=False, http2=True, timeout=60, trust_env=False,
                                     limits=httpx.Limits(max_connections=1)) as client:
            async def one(i: int) -> str:
                body = {**LONG, "model": ["demo", "sql"][i % 2], "max_tokens": 300 if i == 5 else 20 + i, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.http_version == "HTTP/2" and answer.status_code == 200
                    if i == 5:
                        async for _ in answer.aiter_raw():
                            return "left"
                    return (await answer.aread()).decode()
            return await asyncio.gather(*(one(i) for i in range(24)))
    texts = asyncio.run(run())
    for i, text in enumerate(texts):
        if i != 5:
            assert Stream(text.split("\n")).check_shape().finish_reason() == "length"
    demo.wait_idle(3)


# ---- adapters that change

def test_an_overwritten_adapter_serves_new_requests_while_running_ones_keep_the_old(start_server, tmp_path):
    folder = tmp_path / "loras"
    write_random_adapter(folder / "moving", MODEL_CONFIG, 8, seed=1)
    write_random_adapter(tmp_path / "next", MODEL_CONFIG, 16, seed=2)
    server = start_server("--adapter-dir", str(folder))
    body = dict(model="moving", prompt="Tell me about the sea.\n", temperature=0, max_tokens=1500, ignore_eos=True, return_token_ids=True)
    old = complete(server.http, **body)["choices"][0]["token_ids"]
    short = {**body, "max_tokens": 24}

    background = Background(server, **{**body}).wait_running()
    replace_adapter(folder / "moving", tmp_path / "next")
    new = complete(server.http, **short)["choices"][0]["token_ids"]
    assert background.events < 1490, "the old stream still runs"
    assert new != old[:24]
    assert background.result().check_shape().token_ids() == old
    write_random_adapter(tmp_path / "again", MODEL_CONFIG, 16, seed=2)
    direct = start_server("--adapter", f"moving={tmp_path / 'again'}")
    assert complete(direct.http, **short)["choices"][0]["token_ids"] == new


def replace_adapter(directory, source):
    """As a careful deployment does: both files are replaced by rename."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (source / name).replace(directory / name)


def test_an_adapter_added_to_the_folder_is_found_and_a_removed_one_is_not(start_server, tmp_path):
    server = start_server("--adapter-dir", str(tmp_path))
    body = dict(model="late", prompt="x", max_tokens=4)
    assert server.http.post("/v1/completions", json=body).status_code == 404
    write_random_adapter(tmp_path / "late", MODEL_CONFIG, 8)
    complete(server.http, **body)
    assert "late" in {card["id"] for card in server.http.get("/v1/models").json()["data"]}


def test_who_does_not_want_to_wait_for_a_cold_adapter_is_told_to_come_back(start_server, tmp_path):
    write_random_adapter(tmp_path / "cold", MODEL_CONFIG, 64)
    server = start_server("--adapter-dir", str(tmp_path))
    body = dict(model="cold", prompt="x", max_tokens=1, adapter_wait="fail")
    answer = server.http.post("/v1/completions", json=body)
    error = check_error(answer.json())
    assert answer.status_code == 503 and error["code"] == "adapter_loading" and error["retryable"]
    assert int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: server.http.post("/v1/completions", json=body).status_code == 200, "the load that was begun goes on")


def test_more_adapters_than_fit_take_turns(start_server, tmp_path):
    """40 adapters, room for 4 at once: each still gives what it gives alone."""
    for i in range(40):
        write_random_adapter(tmp_path / f"a{i}", MODEL_CONFIG, [4, 16, 40][i % 3], seed=i, gain=2)
    server = start_server("--adapter-dir", str(tmp_path), "--max-loras", "4")
    def body(i: int) -> dict:
        return dict(model=f"a{i}", prompt="Tell me about the sea.\n", temperature=0, max_tokens=12, ignore_eos=True, return_token_ids=True)
    alone = [complete(server.http, **body(i))["choices"][0]["token_ids"] for i in range(40)]
    assert len({tuple(ids) for ids in alone}) == 40

    async def twice():
        async with httpx.AsyncClient(base_url=server.base, timeout=120, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body(i % 40)) for i in range(80)))
            return [answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text for answer in answers]

    assert asyncio.run(twice()) == alone * 2


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


def test_ctrl_c_stops_as_sigterm_does(start_server):
    server = start_server()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit(10) == 0


def test_a_stream_of_a_second_sampled_choice_is_its_own(demo):
    stream = post_stream(demo.http, "/v1/completions", model="demo", prompt="Once upon a time", n=2, temperature=1.3, seed=4, max_tokens=30)
    assert stream.text(0) != stream.text(1)
