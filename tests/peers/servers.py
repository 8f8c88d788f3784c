"""The servers that are measured side by side: how each is started, with the flags that were best, and how requests name an adapter.

Folders come from `Places`; `install.sh` fills them. oneDNN has no server: gemm.py measures it.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ADAPTERS = 16
RANK = 16
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things lie on this machine."""

    model: Path     # SmolLM2-135M-Instruct as the Hub has it
    peers: Path     # what install.sh made: adapters/, gguf/, vllm/, llama/
    loramux: Path   # binary to measure
    threads: int

    def adapters(self) -> list[Path]:
        return [self.peers / "adapters" / f"a{i}" for i in range(ADAPTERS)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way of running one server."""

    name: str             # as tables call it
    peer: str             # loramux, vllm or llama.cpp
    with_adapters: bool
    command: list[str]    # without the port
    env: dict[str, str]
    client: list[str]     # flags of `loramux bench` that say how adapters are named


def loramux(places: Places) -> Kind:
    adapters = [part for i, path in enumerate(places.adapters()) for part in ("--adapter", f"a{i}={path}")]
    command = [str(places.loramux), "--model-id", str(places.model), "--served-model-name", "base", "--host", "127.0.0.1",
               "--admin-listen", "off",
               "--arena-bytes", "1GiB",  # KV and adapters; vLLM has as much for KV alone
               *adapters]
    return Kind("loramux", "loramux", True, command, {}, ["--model", "base", "--models", f"a{{0..{ADAPTERS - 1}}}"])


def vllm(places: Places, with_adapters: bool) -> Kind:
    # README.md says what was tried. The cache holds what torch.compile made, so that a second start does not compile again.
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: the smallest that may be asked for; room for 46 000 tokens
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{places.threads - 1}",
        "VLLM_CACHE_ROOT": str(places.peers / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(places.peers / "vllm/bin/vllm"), "serve", str(places.model), "--served-model-name", "base", "--dtype", "bfloat16",
               "--max-model-len", "2048", "--max-num-seqs", "16", "--host", "127.0.0.1", "--no-enable-log-requests"]
    if not with_adapters:
        return Kind("vllm base", "vllm", False, command, env, ["--model", "base"])
    command += ["--enable-lora", "--max-loras", str(ADAPTERS), "--max-cpu-loras", str(ADAPTERS), "--max-lora-rank", str(RANK),
                "--lora-modules", *(f"a{i}={path}" for i, path in enumerate(places.adapters()))]
    return Kind("vllm lora", "vllm", True, command, env, ["--model", "base", "--models", f"a{{0..{ADAPTERS - 1}}}"])


def llama_cpp(places: Places, with_adapters: bool, weights: str = "bf16") -> Kind:
    gguf = places.peers / "gguf"
    command = [str(places.peers / "llama/build/bin/llama-server"), "--model", str(gguf / f"smollm2-{weights}.gguf"), "--alias", "base",
               "--host", "127.0.0.1", "--threads", str(places.threads), "--threads-batch", str(places.threads), "--parallel", "16",
               "--ctx-size", str(16 * 2048), "--flash-attn", "on", "--cont-batching", "--no-webui"]
    client = ["--model", "base"]
    if with_adapters:
        files = ",".join(str(gguf / f"a{i}.gguf") for i in range(ADAPTERS))
        command += ["--lora", files, "--lora-init-without-apply"]
        client += ["--lora-ids", f"0..{ADAPTERS - 1}"]
    name = "llama.cpp lora" if with_adapters else "llama.cpp base"
    return Kind(name if weights == "bf16" else f"{name} {weights}", "llama.cpp", with_adapters, command, {}, client)


def kinds(places: Places, peers: list[str]) -> list[Kind]:
    """What a record run measures. A peer without adapters is started once more for the base, if that may be faster for it."""
    found = [loramux(places)]
    if "vllm" in peers:
        found += [vllm(places, False), vllm(places, True)]
    if "llama.cpp" in peers:
        found += [llama_cpp(places, False), llama_cpp(places, True)]
    return found


class Server:
    """A started server with all its processes, in a process group of its own."""

    def __init__(self, kind: Kind, log: Path, ready_timeout_s: float = 600.0):
        self.kind = kind
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        with open(log, "wb") as to:
            self.process = subprocess.Popen([*kind.command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=to, stderr=to,
                                            env={**os.environ, **kind.env}, start_new_session=True)
        try:
            self._wait(began + ready_timeout_s, log)
        except BaseException:
            self.stop()
            raise
        self.start_to_ready_s = time.perf_counter() - began

    def _wait(self, deadline: float, log: Path):
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.kind.name} ended with {self.process.returncode}; see {log}")
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self.kind.name} was not ready in time; see {log}")
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """The process and all that it started, by /proc."""
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            queue += parents.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """Processor time of all its processes so far."""
        return sum(ticks(pid) for pid in self.pids()) / TICKS_PER_S

    def memory(self) -> dict[str, int]:
        """Resident bytes over the process tree: `rss` counts a page once for each process that has it, `pss` once."""
        total = {"rss": 0, "pss": 0}
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                name, _, rest = line.partition(":")
                if name.lower() in total:
                    total[name.lower()] += int(rest.split()[0]) * 1024
        return total

    def stop(self):
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        except ProcessLookupError:
            self.process.wait()


def free_port() -> int:
    """A fixed one might be another program's, which would then be measured in the server's place."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
