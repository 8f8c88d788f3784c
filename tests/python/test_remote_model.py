"""`--model-id org/model`: the demo's base from a hub-like server, fetched once, resumed after a kill, refused when it lies."""

import hashlib
import http.server
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from loramux_server import REPOSITORY, Server, binary, clean_environment, wait_until

BASE = REPOSITORY / "models/demo/base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"
ASK = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Hub(http.server.ThreadingHTTPServer):
    """Serves `BASE` as `acme/base` (public) and `acme/closed` (with TOKEN). `bend` may change the bytes of a GET."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.bend = lambda name, body: body
        self.stall = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def refuse(self, status: int):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, with_body: bool):
        hub: Hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.strip("/").split("/")
        if len(parts) != 5 or parts[2] != "resolve" or parts[3] not in ("main", COMMIT):
            return self.refuse(404)
        if parts[1] == "closed" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401)
        file = BASE / Path(parts[4]).name
        if not file.is_file():
            return self.refuse(404)
        whole = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = hub.bend(parts[4], whole)[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        if hub.stall.is_set() and parts[4].endswith(".safetensors"):
            self.wfile.flush()
            hub.stall.wait_clear()
            return
        self.wfile.write(body[half:])


class Stall(threading.Event):
    """While set, bodies of weights stop in the middle."""

    def wait_clear(self):
        while self.is_set():
            threading.Event().wait(0.01)


@pytest.fixture
def hub():
    hub = Hub()
    hub.stall = Stall()
    yield hub
    hub.stall.clear()
    hub.shutdown()


def environment(hub: Hub, **more) -> dict:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": "/nonexistent", **more}


def weights_gets(hub: Hub) -> list:
    return [row for row in hub.asked if row[0] == "GET" and row[1].endswith(".safetensors")]


def test_a_base_model_from_the_hub_answers_like_the_same_files_from_disk_and_is_fetched_once(hub, tmp_path):
    with Server("--model-id", str(BASE), "--served-model-name", "demo") as local:
        expected = local.http.post("/v1/completions", json={"model": "demo", **ASK}).json()["choices"][0]["text"]
    for _ in range(2):
        with Server("--model-id", "acme/base", data_dir=str(tmp_path), env=environment(hub)) as server:
            card = server.http.get("/v1/models").json()["data"][0]
            assert card["id"] == "acme/base" and card["root"] == "hf://acme/base"
            answer = server.http.post("/v1/completions", json={"model": "acme/base", **ASK})
            assert answer.json()["choices"][0]["text"] == expected
    assert len(weights_gets(hub)) == 1
    assert [path.name for path in (tmp_path / "models").iterdir() if path.suffix == ".part"] == []


def test_a_private_base_model_needs_the_servers_token(hub, tmp_path):
    flags = ("--model-id", "hf://acme/closed@main")
    with pytest.raises(AssertionError, match="ended with 1"):
        Server(*flags, data_dir=str(tmp_path), env=environment(hub))
    assert not weights_gets(hub)
    with Server(*flags, data_dir=str(tmp_path), env=environment(hub, HF_TOKEN=TOKEN)) as server:
        assert server.http.get("/health").status_code == 200
        assert TOKEN not in server.log()


def test_a_download_that_was_killed_goes_on_where_it_was(hub, tmp_path):
    hub.stall.set()
    command = [str(binary()), "--port", "0", "--admin-listen", "off", "--model-id", "acme/base", "--data-dir", str(tmp_path)]
    process = subprocess.Popen(
        command, env={**clean_environment(), **environment(hub)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        half = (BASE / "model.safetensors").stat().st_size // 2
        wait_until(lambda: any(p.stat().st_size == half for p in tmp_path.glob("models/*/*.safetensors.part")), "half of the weights", 60)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    hub.stall.clear()
    with Server("--model-id", "acme/base", data_dir=str(tmp_path), env=environment(hub)) as server:
        assert server.http.post("/v1/completions", json={"model": "acme/base", **ASK}).status_code == 200
    assert weights_gets(hub)[-1][2] == f"bytes={half}-"


def test_weights_with_a_wrong_bit_are_never_loaded(hub, tmp_path):
    def flipped(name: str, body: bytes) -> bytes:
        return body[:-1] + bytes([body[-1] ^ 1]) if name.endswith(".safetensors") else body

    hub.bend = flipped
    with pytest.raises(AssertionError, match="ended with 1"):
        Server("--model-id", "acme/base", data_dir=str(tmp_path), env=environment(hub))
    assert len(weights_gets(hub)) == 2, "once again, then given up"
    assert not list(tmp_path.glob("models/*/model.safetensors"))
