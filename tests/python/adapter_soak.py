#!/usr/bin/env python3
"""Thousands of registered adapters under Zipf traffic while their sources fail, and one source that tarpits: markers, memory, stalls.

    python adapter_soak.py --adapters 10000 --minutes 10 --json soak.json

A third of the adapters is at the hub, a third in S3, a third in a local folder; the disk holds a part of them, the host 256, the device
32. Every reply's marker is checked. Beside this traffic, streams on the most popular adapters are timed; in every second window callers
that nobody serves hang in a tarpit of the http source. The ratio of the streams' p99 inter-token times with and without it is the answer
to "does one slow source stall others".
"""

import argparse
import asyncio
import bisect
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import marker
from faults.asking import Answer, allow_files, ask, gather
from faults.client import FaultServer
from faults.serving import ADMIN, SourcedServer, load_ms, reference, write_named
from loramux_server import children

IMAGE_BYTES = 2_088_960  # a marker adapter in the host slab: one page
FIRST = 50_000
ARENA = "256MiB"  # touched as it is used: until then resident memory grows with it
FAULTS = [
    {"do": "reset"},
    {"do": "drop", "at": 0.5},
    {"do": "status", "status": 503},
    {"do": "status", "status": 429, "headers": {"Retry-After": "1"}},
    {"do": "truncate", "at": 0.7},
    {"do": "flip", "at": 0.9, "method": "GET", "path": "adapter_model|/repos/"},
    {"do": "html", "method": "GET"},
    {"do": "delay", "seconds": 0.5},
]
# A source's failure may cost a request, never its truth: these are the refusals that a client is told to retry.
RETRIABLE = {"adapter_load_failed", "adapter_loading", "adapter_auth_unavailable", "queue_full"}


@dataclass
class Settings:
    adapters: int = 10_000
    seconds: float = 600.0
    callers: int = 16
    streams: int = 4
    host_adapters: int = 256
    device_adapters: int = 32
    disk_adapters: int = 4_000
    fault_share: float = 0.05
    window_s: float = 5.0
    zipf: float = 1.0
    seed: int = 1
    tarpit_callers: int = 24


@dataclass
class Record:
    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    gaps_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    resident: list[tuple[float, int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)


class Zipf:
    """Ranks 0..n with weight 1 / (rank + 1)^s."""

    def __init__(self, n: int, s: float):
        self.sums, total = [], 0.0
        for rank in range(n):
            total += (rank + 1) ** -s
            self.sums.append(total)

    def draw(self, rng: random.Random) -> int:
        return bisect.bisect_left(self.sums, rng.random() * self.sums[-1])


class Soak:
    def __init__(self, settings: Settings, faults: FaultServer, server: SourcedServer, root: Path):
        self.settings, self.faults, self.server, self.root = settings, faults, server, root
        self.record, self.rng = Record(), random.Random(settings.seed)
        self.zipf, self.tarpit_on, self.ends = Zipf(settings.adapters, settings.zipf), False, 0.0

    def where(self, i: int) -> str:
        return reference(self.faults, ("hub", "s3", "local")[i % 3], f"soak/m{FIRST + i}", self.root)

    async def register(self):
        """All adapters by name. Their sources are honest meanwhile: 5 % of ten thousand registrations are another test."""
        for i in range(2, self.settings.adapters, 3):
            write_named(self.root, f"soak/m{FIRST + i}")
        calls = [
            ask(self.server.address, "PUT", f"/admin/v1/adapters/a{i}?wait=600s", {"ref": self.where(i)}, ADMIN, 120)
            for i in range(self.settings.adapters)
        ]
        bad = [str(answer) for answer in await gather(calls, 16) if answer.status not in (200, 202)]
        assert not bad, f"{len(bad)} registrations failed, first {bad[0]}"

    def check(self, i: int, answer: Answer):
        """Counts an answer; keeps what should not be."""
        if answer.status == 200:
            seen = marker.read_marker(answer.json())
            self.record.outcomes["served"] += 1
            if seen != marker.marker(FIRST + i):
                self.record.wrong.append(f"a{i}: {seen}, not {marker.marker(FIRST + i)}")
            return
        self.record.outcomes[answer.code or str(answer.status)] += 1
        if answer.code not in RETRIABLE or "retry-after" not in answer.headers:
            self.record.unexpected.append(f"a{i}: {answer}")

    async def caller(self):
        """Zipf traffic; one in ten requests names the adapter by reference instead of its name."""
        while time.monotonic() < self.ends:
            i = self.zipf.draw(self.rng)
            model = self.where(i) if self.rng.random() < 0.1 else f"a{i}"
            prompt = [self.rng.randrange(300, 2000) for _ in range(self.rng.choice((2, 20, 100)))]
            body = {
                "model": model,
                "prompt": prompt,
                **marker.ASK,
                "max_tokens": self.rng.choice((1, 1, 8)),
                "adapter_load_timeout_ms": load_ms(5),
            }
            self.check(i, await ask(self.server.address, "POST", "/v1/completions", body, timeout_s=60))
            await asyncio.sleep(self.rng.expovariate(1 / 0.02))

    async def stream(self):
        """Long streams on the most popular adapters, timed from event to event."""
        host, port = self.server.address.rsplit(":", 1)
        while time.monotonic() < self.ends:
            body = json.dumps(
                {
                    "model": f"a{self.rng.randrange(min(8, self.settings.adapters))}",
                    "prompt": "Hi",
                    "max_tokens": 200,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                }
            )
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(
                    f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
                )
                last, window = None, self.tarpit_on
                while line := await reader.readline():
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        if last is not None and window == self.tarpit_on:
                            self.record.gaps_ms[window].append((now - last) * 1000)
                        last, window = now, self.tarpit_on
            finally:
                writer.close()

    async def tarpit(self):
        """Windows in turns: callers of adapters that drip in, and none."""
        number = 0
        while time.monotonic() < self.ends:
            await asyncio.sleep(self.settings.window_s)
            self.tarpit_on, stuck = True, []
            for _ in range(self.settings.tarpit_callers):
                number += 1
                body = {"model": reference(self.faults, "http", f"tarpit{number}/m{FIRST + number}"), "prompt": "x", "max_tokens": 1}
                stuck.append(asyncio.create_task(ask(self.server.address, "POST", "/v1/completions", body, timeout_s=60)))
            await asyncio.sleep(self.settings.window_s)
            self.tarpit_on = False
            for one in stuck:
                self.record.outcomes["left the tarpit"] += 1
                one.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    def resident_bytes(self) -> int:
        """Router and shard together."""
        pages = 0
        for pid in (self.server.pid, *children(self.server.pid)):
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                pass
        return pages * 4096

    async def sample(self):
        while time.monotonic() < self.ends:
            self.record.resident.append((time.monotonic(), self.resident_bytes()))
            self.record.files.append(sum(self.server.open_files().values()))
            await asyncio.sleep(0.5)

    async def run(self) -> dict:
        started = time.monotonic()
        await self.register()
        registered_s = time.monotonic() - started
        self.faults.rules(
            {"do": "tarpit", "bytes_per_s": 5, "path": "tarpit"},
            *({"chance": self.settings.fault_share / len(FAULTS), **fault} for fault in FAULTS),
        )
        mark, self.ends = self.faults.mark(), time.monotonic() + self.settings.seconds
        await asyncio.gather(
            self.sample(),
            self.tarpit(),
            *(self.caller() for _ in range(self.settings.callers)),
            *(self.stream() for _ in range(self.settings.streams)),
        )
        requests = self.faults.mark() - mark
        self.faults.rules()
        return {"settings": vars(self.settings), "registered_s": round(registered_s, 1), **self.report(requests)}

    def report(self, source_requests: int) -> dict:
        record = self.record
        half = record.resident[len(record.resident) // 2 :]
        slope = (
            statistics.linear_regression([at for at, _ in half], [size / 2**20 for _, size in half]).slope * 60 if len(half) > 2 else 0.0
        )
        quantiles = {
            name: (
                {"count": len(gaps), "p50_ms": round(statistics.median(gaps), 3), "p99_ms": round(statistics.quantiles(gaps, n=100)[98], 3)}
                if len(gaps) > 100
                else {"count": len(gaps)}
            )
            for name, gaps in (("without_tarpit", record.gaps_ms[False]), ("with_tarpit", record.gaps_ms[True]))
        }
        p99 = [quantiles[name].get("p99_ms") for name in ("with_tarpit", "without_tarpit")]
        metrics = self.server.metrics()
        return {
            "outcomes": dict(record.outcomes),
            "wrong_markers": len(record.wrong),
            "wrong": record.wrong[:5],
            "unexpected": len(record.unexpected),
            "unexpected_first": record.unexpected[:5],
            "inter_token": quantiles,
            "p99_ratio": round(p99[0] / p99[1], 3) if all(p99) else None,
            "resident_mib": {
                "first": record.resident[0][1] >> 20,
                "last": record.resident[-1][1] >> 20,
                "max": max(size for _, size in record.resident) >> 20,
                "slope_mib_per_min": round(slope, 3),
            },
            "open_files": {"first": record.files[0], "last": record.files[-1], "max": max(record.files)},
            "source_requests": source_requests,
            "temporary_files": self.server.temporary_files(),
            "shard_restarts": metrics["loramux_shard_restarts_total"],
            "evictions": {name: value for name, value in metrics.items() if name.startswith("loramux_adapter") and "label" not in name},
        }


def soak(settings: Settings) -> dict:
    """Starts both servers, runs, and says what was seen."""
    allow_files(4096)
    with FaultServer() as faults, tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder) / "root"
        root.mkdir()
        flags = [
            "--adapter-root",
            str(root),
            "--arena-bytes",
            ARENA,
            "--max-loras",
            str(settings.device_adapters),
            "--host-adapter-memory",
            str(settings.host_adapters * IMAGE_BYTES),
            "--adapter-disk-quota",
            str(settings.disk_adapters * 14_500),
            "--adapter-loads",
            "32",
        ]
        with SourcedServer(faults, *flags) as server:
            return asyncio.run(Soak(settings, faults, server, root).run())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the report goes; else to standard output")
    args = parser.parse_args()
    report = json.dumps(soak(Settings(adapters=args.adapters, seconds=args.minutes * 60, callers=args.callers, seed=args.seed)), indent=1)
    args.json.write_text(report + "\n") if args.json else print(report)


if __name__ == "__main__":
    main()
