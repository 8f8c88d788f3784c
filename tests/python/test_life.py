"""Start and stop, flags and keys: what an operator and an orchestrator rely on."""

import json
import re
import signal
import socket
import time

import httpx
import pytest

from background import LONG, Background
from loramux_server import REPOSITORY, children, run_to_end, wait_until
from raw_http import raw_connection
from wire import chat, check_error, complete, post_stream

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())


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


def test_ctrl_c_stops_as_sigterm_does(start_server):
    server = start_server()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit(10) == 0


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
