"""Starts the real `loramux` binary, reads its address from the log, and always ends what it started."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
POLL_S = 0.01


def binary() -> Path:
    path = Path(os.environ.get("LORAMUX_BIN", REPOSITORY / "target/release/loramux"))
    if not path.is_file():
        raise RuntimeError(f"{path} does not exist: run `cargo build --release`, or set LORAMUX_BIN")
    return path


def wait_until(condition, what: str, timeout_s: float = 10.0):
    """Polls `condition` until it is true and returns its value; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_S)


def children(pid: int) -> list[int]:
    """Live children of a process, by /proc. Zombies do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def slow_model(folder: Path) -> list[str]:
    """Flags of a server whose steps take milliseconds on any machine: random weights, the demo's tokenizer."""
    base = REPOSITORY / "models/demo/base"
    config = json.loads((base / "config.json").read_text())
    config |= dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base / file, folder)
    return ["--model-id", str(folder), "--load-format", "dummy", "--served-model-name", "demo"]


class Server:
    """One `loramux` process. `Server("--max-n", "4")` starts it and waits until /health is 200."""

    live: list["Server"] = []

    def __init__(self, *flags: str, env: dict | None = None, data_dir: str | None = None, api_key: str | None = None,
                 start_timeout_s: float = START_TIMEOUT_S):
        self.log_file = tempfile.NamedTemporaryFile(prefix="loramux-", suffix=".log", delete=False)
        self.api_key = api_key
        command = [str(binary()), "--port", "0", "--log-format", "json", *flags]
        if "--admin-listen" not in flags:
            command += ["--admin-listen", "off"]  # the default address is one for the whole machine
        if data_dir:
            command += ["--data-dir", data_dir]
        if api_key:
            command += ["--api-key", api_key]
        # Its own process group, so that `close` reaches the shard too.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log_file, stderr=subprocess.STDOUT,
            env=environment(env), start_new_session=True)
        self.pid = self.process.pid
        Server.live.append(self)
        try:
            self.address = wait_until(self._address, "the log line `ready`", start_timeout_s)
            self.base = f"http://{self.address}"
            self.http = httpx.Client(base_url=self.base, timeout=60.0, headers=self.headers, trust_env=False)
            wait_until(self.is_healthy, "/health answers 200", START_TIMEOUT_S)
        except BaseException:
            log = self.log()
            self.close()
            print(f"---- log of loramux {' '.join(flags)}\n{log[-8000:]}")
            raise

    @property
    def headers(self) -> dict:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def log(self) -> str:
        return Path(self.log_file.name).read_text(errors="replace")

    def log_events(self) -> list[dict]:
        """The JSON lines of the log; what is meant for people is skipped."""
        events = []
        for line in self.log().splitlines():
            if line.startswith("{"):
                try:
                    events.append(json.loads(line))
                except ValueError:
                    pass  # half written
        return events

    def admin(self, key: str | None = None) -> httpx.Client:
        """A client of the operator's listener."""
        address = [event for event in self.log_events() if event.get("message") == "ready"][-1]["admin"]
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if address.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=address.removeprefix("unix:"))
            return httpx.Client(base_url="http://localhost", transport=transport, timeout=60.0, headers=headers)
        self.admin_address = address.removeprefix("http://")
        return httpx.Client(base_url=address, timeout=60.0, headers=headers, trust_env=False)

    def _address(self):
        if self.process.poll() is not None:
            raise AssertionError(f"loramux ended with {self.process.returncode} before it was ready")
        ready = [event for event in self.log_events() if event.get("message") == "ready"]
        return ready[-1]["address"] if ready else None

    def is_healthy(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def shard_pid(self) -> int | None:
        found = children(self.pid)
        return found[0] if len(found) == 1 else None

    def metrics(self) -> dict[str, float]:
        """Sample name -> sum over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def metric(self, name: str) -> float:
        return self.metrics()[name]

    def wait_idle(self, timeout_s: float = 10.0):
        """Nothing runs and nothing waits."""
        def idle():
            metrics = self.metrics()
            return metrics["vllm:num_requests_running"] == 0 and metrics["vllm:num_requests_waiting"] == 0
        wait_until(idle, "running and waiting are 0", timeout_s)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self, timeout_s: float) -> int:
        return self.process.wait(timeout=timeout_s)

    def close(self):
        """Ends the process and its shard, however they are."""
        if getattr(self, "http", None):
            self.http.close()
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.log_file.close()
        Path(self.log_file.name).unlink(missing_ok=True)
        if self in Server.live:
            Server.live.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def clean_environment() -> dict:
    """This environment without flags and credentials that a developer may have set for their own server."""
    others = ("LORAMUX_", "RUST_LOG", "HF_", "HUGGING", "AWS_", "S3_", "R2_", "GOOGLE_", "VLLM_", "LORA", "PREDIBASE_", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def environment(changes: dict | None) -> dict:
    """What a server of a test sees. It asks the hub only where the test has one."""
    found = {**clean_environment(), **(changes or {})}
    if "HF_ENDPOINT" not in found:
        found.setdefault("HF_HUB_OFFLINE", "1")
    return found


def run_to_end(*flags: str, timeout_s: float = 30.0, env: dict | None = None) -> subprocess.CompletedProcess:
    """Runs `loramux` with flags that make it end by itself."""
    return subprocess.run([str(binary()), *flags], capture_output=True, text=True, timeout=timeout_s,
                          env=environment(env), stdin=subprocess.DEVNULL)
