"""What a server says around its routes: unknown fields, other origins, keys of single routes, drain, heads that cannot be read."""

import json
import os
import signal
import socket
import subprocess

import httpx
import pytest

from loramux_server import binary, wait_until
from wire import check_error, complete

PROMPT = dict(prompt="Tell me about the sea.\n", temperature=0, max_tokens=24)


def test_bad_words_do_not_come(demo):
    text = complete(demo.http, model="pirate", **PROMPT)["choices"][0]["text"]
    word = max(text.split(), key=len).strip(".,!?'\"")
    assert word
    without = complete(demo.http, model="pirate", bad_words=[word], **PROMPT)["choices"][0]["text"]
    assert word not in without, f"{word!r} came: {without!r}"
    assert complete(demo.http, model="pirate", **PROMPT)["choices"][0]["text"] == text


def test_an_unknown_field_is_named(demo, start_server):
    answer = demo.http.post("/v1/completions", json={**PROMPT, "max_tokens": 1, "tempreature": 1, "user": "u"})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "tempreature"
    strict = start_server("--strict-fields")
    answer = strict.http.post("/v1/completions", json={**PROMPT, "max_tokens": 1, "tempreature": 1})
    assert answer.status_code == 400 and check_error(answer.json())["param"] == "tempreature"
    slip = {"structured_outputs": {"choice": ["a", "b"], "chioces": 1}, "max_tokens": 4}
    answer = demo.http.post("/v1/completions", json={**PROMPT, **slip})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "structured_outputs.chioces"
    answer = strict.http.post("/v1/completions", json={**PROMPT, **slip})
    assert answer.status_code == 400 and check_error(answer.json())["param"] == "structured_outputs.chioces"
    tool = {"type": "function", "function": {"name": "f", "input_schema": {"type": "object"}}}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    answer = demo.http.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 400 and check_error(answer.json())["param"] == "tools[0].function.input_schema"
    complete(strict.http, **PROMPT, user="u", model="demo")


def test_origins_keys_settings_and_the_default_adapter(start_server):
    server = start_server("--cors-allow-origin", "https://app.example", "--metrics-key", "scrape", "--admin-key", "root",
                          "--adapter-id", "pirate", "--trust-request-chat-template", api_key="k")
    page = {"origin": "https://app.example"}
    asked = httpx.options(f"{server.base}/v1/completions", headers={**page, "access-control-request-method": "POST",
                                                                    "access-control-request-headers": "authorization"})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://app.example"
    refused = httpx.get(f"{server.base}/v1/models", headers=page)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
    assert check_error(refused.json())["code"] == "invalid_api_key"

    def get(path, key):
        return httpx.get(server.base + path, headers={"authorization": f"Bearer {key}"} if key else {})
    assert [get("/metrics", key).status_code for key in (None, "k", "scrape", "root")] == [401, 401, 200, 200]
    assert [get("/server_info", key).status_code for key in ("k", "scrape", "root")] == [403, 401, 200]
    settings = get("/server_info", "root").json()["settings"]
    assert settings["api-key"] == ["***"] and settings["adapter-id"] == "pirate" and "scrape" not in json.dumps(settings)

    answer = server.http.post("/v1/completions", json={"model": "demo", **PROMPT})
    assert answer.headers["x-adapter-id"] == "pirate"
    base = server.http.post("/v1/completions", json={"model": "demo", "adapter_id": "__base_model__", **PROMPT})
    assert "x-adapter-id" not in base.headers and base.json()["choices"][0]["text"] != answer.json()["choices"][0]["text"]
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1, "return_token_ids": True}
    own = server.http.post("/v1/chat/completions", json={**chat, "chat_template": "{{ messages[0].content }}"}).json()
    assert own["usage"]["prompt_tokens"] < server.http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]

    admin = httpx.Client(base_url=server.base, headers={"authorization": "Bearer root"})
    assert admin.post("/admin/v1/cache/reset", json={"prefix": True}).json() == {"prefix": True, "disk": False}
    assert check_error(admin.post("/admin/v1/cache/reset", json={"prefixes": True}).json())["param"] == "prefixes"
    error = check_error(admin.get("/admin/v1/adapters?limits=3").json())
    assert (error["code"], error["param"]) == ("unsupported_parameter", "limits")


def test_an_emptied_prefix_cache_is_empty(start_server):
    server = start_server("--admin-key", "root", api_key="k")
    body = {"model": "demo", "prompt": "Tell me about the sea. " * 12, "max_tokens": 1, "temperature": 0}

    def cached():
        return server.http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached() == 0 and cached() > 0
    httpx.post(f"{server.base}/admin/v1/cache/reset", json={"prefix": True}, headers={"authorization": "Bearer root"}).raise_for_status()
    assert cached() == 0 and cached() > 0


def test_who_comes_while_the_server_drains_is_told(start_server, slow_flags):
    server = start_server(*slow_flags, "--drain-timeout", "30")
    with server.http.stream("POST", "/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True}) as running:
        lines = running.iter_lines()
        next(lines)
        server.terminate()

        def told():
            answer = httpx.post(f"{server.base}/v1/completions", json={"prompt": "x"}, timeout=30)
            return answer if answer.status_code == 503 else None
        answer = wait_until(told, "503", 20)
        assert check_error(answer.json())["code"] == "draining" and int(answer.headers["retry-after"]) > 0
    assert server.wait_exit(20) == 0


def test_a_head_that_cannot_be_read_gets_an_error_body(demo):
    host, port = demo.address.rsplit(":", 1)
    for head, status in [(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 130_000 + b"\r\n\r\n", 431), (b"NONSENSE\r\n\r\n", 400)]:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        first, _, body = answer.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 %d " % status), first[:80]
        check_error(json.loads(body))


@pytest.mark.parametrize("flags, env, want", [
    (["--served-model-name", ""], {}, "--served-model-name"),
    (["--log-level", "bogus"], {}, "--log-level bogus"),
    ([], {"VLLM_API_KEY": ""}, "VLLM_API_KEY"),
    (["--num-shard", "2"], {}, "--num-shard 2"),
    (["--ngrok"], {}, "--ngrok"),
    (["--cors-allow-origin", "example.com"], {}, "--cors-allow-origin"),
    (["--metrics-key", ""], {}, "--metrics-key"),
    (["--config", "/nonexistent.toml"], {}, "/nonexistent.toml"),
    (["--max-num-seq", "2"], {}, "--max-num-seqs"),
])
def test_a_mistake_on_the_command_line_is_named(flags, env, want, data_dir):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LORAMUX")}
    ended = subprocess.run([str(binary()), "--port", "0", "--admin-listen", "off", "--data-dir", data_dir, *flags],
                           env={**clean, **env}, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and want in ended.stderr, ended.stderr


def test_flags_variables_and_the_file_of_settings(start_server, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('max-n = 2\nserved-model-name = ["first", "second"]\n')
    server = start_server("--config", str(file), "--trust-remote-code", "--num-shard", "1", env={"MAX_STOP_SEQUENCES": "3"})
    assert {card["id"] for card in server.http.get("/v1/models").json()["data"]} >= {"first", "second"}
    info = server.http.get("/info").json()
    assert (info["max_best_of"], info["max_stop_sequences"]) == (2, 3)
    notices = [event["message"] for event in server.log_events() if "has no effect" in event.get("message", "")]
    assert len(notices) == 2, notices
    server.process.send_signal(signal.SIGTERM)


def test_an_adapters_own_template_and_tokens(start_server, tmp_path):
    import shutil
    from loramux_server import REPOSITORY
    source = next(p for p in (REPOSITORY / "models/demo").rglob("adapter_config.json")).parent
    for name in ("own", "adds"):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "own/chat_template.jinja").write_text("{{ messages[-1].content }}")
    (tmp_path / "adds/added_tokens.json").write_text('{"<tool>": 99999}')
    server = start_server("--adapter-dir", str(tmp_path), "--adapter-chat-template")
    chat = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    own = server.http.post("/v1/chat/completions", json={"model": "own", **chat}).json()["usage"]["prompt_tokens"]
    assert own < server.http.post("/v1/chat/completions", json={"model": "demo", **chat}).json()["usage"]["prompt_tokens"]
    refused = server.http.post("/v1/completions", json={"model": "adds", "prompt": "x"})
    error = check_error(refused.json())
    assert refused.status_code == 422 and error["code"] == "adapter_unsupported" and "<tool>" in error["message"]
