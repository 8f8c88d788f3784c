"""AIBrix's sidecar (the real program) and its controller (its calls replayed) load, list and unload adapters on our server."""

import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

import httpx
import pytest

import marker
from faults.client import FaultServer
from faults.serving import environment, write_named
from loramux_server import Server, wait_until
from third_party import program

# Fixed in the sidecar.
ADAPTERS = Path("/tmp/aibrix/adapters")
KEY = "key-of-the-tests"
# Words in an error by which the controller decides that trying again may help.
RETRIABLE = ("connection refused", "connection reset", "timeout", "no route to host", "network is unreachable", "temporary failure",
             "service unavailable", "bad gateway")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Program:
    """A third-party program that answers HTTP; ended after the test."""

    def __init__(self, command: list[str], port: int, health: str, folder: Path, env: dict | None = None):
        self.log_path = folder / f"{Path(command[0]).name}.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, env=env)
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=90, trust_env=False)
        try:
            wait_until(lambda: self._answers(health), f"{command[0]} answers", 120)
        except BaseException:
            print(self.log()[-6000:])
            self.close()
            raise

    def _answers(self, path: str) -> bool:
        assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.log()[-3000:]}"
        try:
            return self.http.get(path).status_code < 500
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def close(self):
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as faults:
        yield faults


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Another S3: adapters `loras/m<i>/` of marker i."""
    folder, port = tmp_path_factory.mktemp("moto"), free_port()
    server = Program([program("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, "/", folder)
    # Unsigned requests are the owner's there.
    assert server.http.put("/loras").status_code == 200
    for i in (31, 32):
        for name, content in marker.files(i).items():
            assert server.http.put(f"/loras/m{i}/{name}", content=content).status_code == 200
    yield server
    server.close()


def flags(faults, root: Path) -> list[str]:
    hosts = f"127.0.0.1:{faults.ports['cdn']}"
    # The hub's downloads come from a host of this machine.
    downloads = ["--hub-hosts", hosts, "--adapter-http-networks", "127.0.0.0/8"]
    return ["--allow-runtime-adapters", "--admin-listen", "off", *downloads, "--adapter-root", str(root)]


@pytest.fixture(scope="module")
def engine(faults, tmp_path_factory):
    """Our server as the pod's engine: with a key that the sidecar does not have."""
    ADAPTERS.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("engine")
    # No admin key: then these routes are the API keys', and trusted peers'.
    with Server(*flags(faults, ADAPTERS), "--trust-loopback-adapters", api_key=KEY, data_dir=str(folder / "data"), env=environment(faults, folder)) as engine:
        yield engine


@pytest.fixture(scope="module")
def sidecar(engine, faults, bucket, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("sidecar"), free_port()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "LORAMUX_"))},
        "INFERENCE_ENGINE": "vllm", "INFERENCE_ENGINE_VERSION": "0.9.0", "INFERENCE_ENGINE_ENDPOINT": engine.base,
        "AWS_ENDPOINT_URL": bucket.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "HF_ENDPOINT": faults.url("hub"), "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "prom"), "NO_PROXY": "127.0.0.1",
    }
    server = Program([program("aibrix_runtime"), "--host", "127.0.0.1", "--port", str(port)], port, "/healthz", folder, env)
    yield server
    server.close()


@pytest.fixture
def name():
    """A new name; what the sidecar keeps of it goes afterwards."""
    name = f"t-{uuid.uuid4().hex[:12]}"
    yield name
    shutil.rmtree(ADAPTERS / name, ignore_errors=True)


def load(sidecar, name: str, url: str) -> httpx.Response:
    return sidecar.http.post("/v1/lora_adapter/load", json={"lora_name": name, "artifact_url": url})


def unload(sidecar, name: str, cleanup: bool) -> httpx.Response:
    return sidecar.http.post("/v1/lora_adapter/unload", json={"lora_name": name, "cleanup_local": cleanup})


def listed(server) -> list[str]:
    return [card["id"] for card in server.http.get("/v1/models").json()["data"]]


def served_marker(server, name: str):
    answer = server.http.post("/v1/completions", json={"model": name, "prompt": "Hi", **marker.ASK})
    return marker.read_marker(answer.json()) if answer.status_code == 200 else answer.status_code


@pytest.mark.parametrize("i, url", [(21, "huggingface://acme/m21"), (31, "s3://loras/m31/")])
def test_the_sidecar_brings_an_adapter_and_takes_it_away(sidecar, engine, name, i, url):
    answer = load(sidecar, name, url)
    assert answer.status_code == 200 and answer.json()["status"] == "success", f"{answer.text}\n{sidecar.log()[-3000:]}"
    assert served_marker(engine, name) == marker.marker(i)
    assert name in listed(engine) and name in [card["id"] for card in sidecar.http.get("/v1/models").json()["data"]]
    again = load(sidecar, name, url)
    assert again.status_code != 200 and "already been loaded" in again.text, "a second load of a name says what vLLM says"
    assert served_marker(engine, name) == marker.marker(i), "and disturbs nothing"
    assert unload(sidecar, name, True).status_code == 200
    assert name not in listed(engine) and served_marker(engine, name) == 404


@pytest.mark.parametrize("i, url", [(22, "huggingface://acme/m22"), (32, "s3://loras/m32/")])
def test_a_second_load_passes_the_parent_directory(sidecar, engine, name, i, url):
    """The files are still there, as after a restart of the engine; of the hub's, the sidecar names the folder above the snapshot."""
    assert load(sidecar, name, url).status_code == 200
    assert unload(sidecar, name, False).status_code == 200
    assert served_marker(engine, name) == 404
    assert (ADAPTERS / name / ".aibrix_download_complete").exists()
    answer = load(sidecar, name, url)
    assert answer.status_code == 200, answer.text
    assert served_marker(engine, name) == marker.marker(i)
    assert unload(sidecar, name, True).status_code == 200


def test_an_artifact_that_is_not_there_and_a_name_that_is_not_loaded(sidecar, engine, name):
    for url in ("huggingface://acme/nothing", "s3://loras/nothing/"):
        answer = load(sidecar, name, url)
        assert answer.status_code == 500 and name not in listed(engine), answer.text
    assert unload(sidecar, name, True).status_code == 200, "the sidecar takes our 404"


def test_the_sidecar_reads_our_metrics(sidecar):
    text = sidecar.http.get("/metrics/", follow_redirects=True).text
    assert "aibrix:" in text and "num_requests_running" in text, text[:2000]


def test_trusted_peers_may_load_and_list_and_nothing_else(engine, name):
    bare = httpx.Client(base_url=engine.base, timeout=30, trust_env=False)
    write_named(ADAPTERS, f"{name}/m41")
    assert bare.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(ADAPTERS / name / "m41")}).status_code == 200
    assert bare.get("/v1/models").status_code == 200
    for path in ("/v1/completions", "/generate", "/", "/tokenize"):
        assert bare.post(path, json={"model": name, "prompt": "Hi", "inputs": "Hi"}).status_code == 401, path
    null_id = bare.post("/v1/unload_lora_adapter", json={"lora_name": name, "lora_int_id": None})
    assert null_id.status_code == 200, null_id.text
    assert bare.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "/etc"}).status_code == 404


class Controller:
    """What the controller does to an engine, with its strictness: 30 s for a request, 200 or 201, the name among the cards."""

    def __init__(self, server, key: str | None):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=server.base, timeout=30, headers=headers, trust_env=False)

    def has(self, name: str) -> bool:
        answer = self.http.get("/v1/models")
        assert answer.status_code == 200, answer.text
        return any(card["id"] == name for card in answer.json()["data"])

    def reconcile(self, name: str, url: str) -> httpx.Response | None:
        """One round of its loop; `None`: there was nothing to do."""
        if self.has(name):
            return None
        path = url.removeprefix("huggingface://") if url.startswith("huggingface://") else url
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

    def delete(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


@pytest.mark.parametrize("i, url", [(51, "huggingface://acme/m51"), (52, "hf://acme/m52"), (53, "s3://public-bucket/acme/m53"),
                                    (54, "gs://bucket/acme/m54"), (55, "gcs://bucket/acme/m55")])
def test_the_controller_brings_every_scheme(engine, name, i, url):
    controller = Controller(engine, KEY)
    answer = controller.reconcile(name, url)
    assert answer.status_code == 200, answer.text
    assert controller.reconcile(name, url) is None, "it is listed now"
    assert served_marker(engine, name) == marker.marker(i)
    assert controller.delete(name).status_code == 200
    assert not controller.has(name) and controller.delete(name).status_code == 404


def test_a_load_goes_on_when_the_controller_gives_up_and_is_joined(engine, faults, name):
    faults.rules({"dialect": "hub", "path": "adapter_model", "do": "delay", "seconds": 4})
    try:
        controller = Controller(engine, KEY)
        controller.http.timeout = httpx.Timeout(1.0)  # 30 s, scaled
        with pytest.raises(httpx.ReadTimeout):
            controller.reconcile(name, "hf://acme/m61")
        assert not controller.has(name), "not listed before it can be used"
        controller.http.timeout = httpx.Timeout(30.0)
        joined = controller.reconcile(name, "hf://acme/m61")
        assert joined is None or joined.status_code == 200, joined.text
        assert served_marker(engine, name) == marker.marker(61)
        other = controller.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "hf://acme/m62"})
        assert other.status_code == 400 and "already been loaded" in other.text
    finally:
        faults.rules()
        Controller(engine, KEY).delete(name)


def test_what_may_help_to_try_again_says_so_in_the_controllers_words(engine, faults, name):
    controller = Controller(engine, KEY)
    permanent = controller.reconcile(name, "hf://acme/nothing")
    assert permanent.status_code == 404
    assert not [word for word in RETRIABLE if word in permanent.text.lower()], permanent.text
    faults.rules({"dialect": "s3", "do": "status", "status": 503})
    try:
        answer = controller.reconcile(name, "s3://public-bucket/acme/m63")
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert [word for word in RETRIABLE if word in answer.text.lower()], answer.text
        assert not controller.has(name)
    finally:
        faults.rules()


def test_an_eviction_is_no_reason_to_load_again(faults, data_dir, tmp_path):
    for i in range(6):
        write_named(tmp_path, f"r/m{70 + i}")
    # Two of them fit on the device.
    with Server(*flags(faults, tmp_path), "--max-loras", "2", data_dir=data_dir) as server:
        controller = Controller(server, None)
        for i in range(6):
            answer = controller.http.post("/v1/load_lora_adapter", json={"lora_name": f"e{i}", "lora_path": str(tmp_path / f"r/m{70 + i}")})
            assert answer.status_code == 200, answer.text
        for _ in range(2):
            assert [served_marker(server, f"e{i}") for i in range(6)] == [marker.marker(70 + i) for i in range(6)]
        assert {f"e{i}" for i in range(6)} <= set(listed(server))
