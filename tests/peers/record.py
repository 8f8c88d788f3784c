#!/usr/bin/env python3
"""Measures loramux, vLLM's CPU build and llama.cpp on this machine in one run: the same client, the same prompts, taking turns.

    python record.py --model MODEL --peers-dir DIR --loramux BINARY --bench BINARY --out FOLDER

All servers are started first, one after another, and stay up; before each round the others must be idle. Within a workload the servers take
turns, round after round. FOLDER gets the client's JSON of each round, the servers' logs, run.json with everything, and report.md.
Needs only the standard library; the client is `loramux bench --url` (--bench, by default the binary of --loramux).
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import targets
from servers import ADAPTERS, Kind, Places, Server, kinds

# label -> (workload of `loramux bench`, whether it uses adapters)
WORKLOADS = {
    "base-1": ("base:c=1:requests=8", False),
    "base": ("base:c=16:requests=48", False),
    "one": ("one:c=16:requests=48", True),
    "distinct": ("distinct:c=16:requests=48", True),
    "prefill-128": ("prefill:c=4:prompt=128:output=1:requests=48", False),
    "prefill-128-one": ("prefill-one:c=4:prompt=128:output=1:requests=48", True),
    "prefill-1024": ("prefill:c=4:prompt=1024:output=1:requests=12", False),
}
IDLE_SHARE = 0.05  # of one processor, that a server without requests may use


def machine(program: Path | None) -> dict:
    """The processor, and what machine.cpp measured where it is given."""
    model = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    found = {"processor": model, "processors": os.cpu_count(), "kernel": platform.release()}
    if program:
        lines = [json.loads(line) for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()]
        found["ceilings"] = lines
        found["read_gb_s"] = max(line["best"] for line in lines if line["op"] == "read")
    return found


def read_beside(args, server: Server, label: str) -> float | None:
    """Read bandwidth now, for the round that is held against it: on a virtual machine it changes within minutes."""
    if label != "base-1" or server.kind.peer != "loramux" or args.read_gb_s or not args.machine:
        return None
    return machine(args.machine)["read_gb_s"]


def busy_share(seconds: float, servers: list[Server]) -> float:
    """Share of the processors that programs other than the servers used in that time."""
    def clocks():
        fields = list(map(int, open("/proc/stat").readline().split()[1:9]))
        return sum(fields), fields[3] + fields[4]

    def own():
        return sum(server.cpu_s() for server in servers) * os.sysconf("SC_CLK_TCK")

    (all_before, idle_before), own_before = clocks(), own()
    time.sleep(seconds)
    (all_after, idle_after), own_after = clocks(), own()
    whole = max(1, all_after - all_before)
    return max(0.0, (whole - (idle_after - idle_before) - (own_after - own_before)) / whole)


def wait_idle(server: Server, timeout_s: float = 60.0) -> float:
    """Waits until a server without requests uses (almost) no processor; gives the last share seen."""
    end = time.monotonic() + timeout_s
    while True:
        before = server.cpu_s()
        time.sleep(1.0)
        share = server.cpu_s() - before
        if share <= IDLE_SHARE or time.monotonic() > end:
            return share


def complete(server: Server, adapter: int | None, prompt: list[int], tokens: int) -> str:
    body = {"model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if server.kind.peer == "llama.cpp":
        if server.kind.with_adapters:
            body["lora"] = [{"id": i, "scale": float(i == adapter)} for i in range(ADAPTERS)]
    elif adapter is not None:
        body["model"] = f"a{adapter}"
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        reply = json.load(answer)
    got = reply["usage"]["completion_tokens"]
    if got != tokens:
        raise RuntimeError(f"{server.kind.name}: {got} tokens instead of {tokens}")
    return reply["choices"][0]["text"]


def check_adapters(server: Server) -> dict:
    """Every adapter must change the reply, and no two adapters may give the same one."""
    prompt = [300 + 7 * i for i in range(48)]
    base = complete(server, None, prompt, 24)
    texts = [complete(server, i, prompt, 24) for i in range(ADAPTERS)] if server.kind.with_adapters else []
    if base in texts or len(set(texts)) != len(texts):
        raise RuntimeError(f"{server.kind.name}: adapters do not change the reply: {[base, *texts]}")
    return {"base": base, "adapters": texts}


def agreement(checks: dict[str, dict], ours: str = "loramux") -> list[str]:
    """How far the servers' greedy replies agree with ours: another rounding may part them, another adapter parts them at once."""
    def same(a: str, b: str) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

    lines = []
    for name, check in checks.items():
        if ours not in checks or name == ours:
            continue
        pairs = [(check["base"], checks[ours]["base"]), *zip(check["adapters"], checks[ours]["adapters"])]
        lines.append(f"{name}: leading characters equal to {ours}'s, base first: {[same(a, b) for a, b in pairs]}")
    return lines


def one_round(server: Server, args, label: str, seed: int, to: Path) -> dict:
    workload = WORKLOADS[label][0]
    scale = args.scale * (args.own_scale if server.kind.peer == "loramux" else 1)
    requests = max(4, round(int(workload.rpartition("requests=")[2]) * scale))
    workload = f"{workload.rpartition(':requests=')[0]}:requests={requests}:label={label}"
    warmup = ["--warmup", str(args.warmup)] if args.warmup is not None else []
    command = [str(args.bench), "bench", "--url", server.url, "--name", server.kind.name, "--workloads", workload, "--repeats", "1",
               "--seed", str(seed), "--timeout", "900s", "--server-pid", str(server.process.pid), "--json", str(to), *warmup, *server.kind.client]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{server.kind.name} {label}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return json.loads(to.read_text())["results"][0]["rounds"][0]


def start_all(found: list[Kind], out: Path, starts: int, servers: list[Server]) -> dict[str, list[float]]:
    """Starts each server alone, `starts` times (the last one stays in `servers`); gives the seconds from start to ready."""
    times: dict[str, list[float]] = {}
    for kind in found:
        for again in range(starts):
            server = Server(kind, out / f"{kind.name.replace(' ', '-')}.log")
            # The first start only warms: it reads files from the disk, and may compile.
            if again or starts == 1:
                times.setdefault(kind.name, []).append(server.start_to_ready_s)
            print(f"{kind.name}: ready after {server.start_to_ready_s:.2f} s", flush=True)
            if again + 1 < starts:
                server.stop()
        servers.append(server)
    return times


def measure(args, servers: list[Server], run: dict):
    """The rounds. Prompts differ from round to round, and are the same for all servers."""
    labels = args.workloads.split(",") if args.workloads else list(WORKLOADS)
    for round_number in range(args.rounds):
        for place, label in enumerate(labels):
            takes = [s for s in servers if s.kind.with_adapters or not WORKLOADS[label][1]]
            # The one that begins changes, so that nobody is always first.
            turn = round_number % len(takes)
            for server in takes[turn:] + takes[:turn]:
                if (label, server.kind.name) in run["skipped"]:
                    continue
                for other in servers:
                    wait_idle(other)
                others_busy = busy_share(1.0, servers)
                name = f"{label}-{server.kind.name.replace(' ', '-')}-{round_number}.json"
                reads = [read_beside(args, server, label)]
                before = time.monotonic()
                try:
                    got = one_round(server, args, label, 1000 * round_number + place, args.out / name)
                except RuntimeError as error:
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    run["failures"].append(str(error))
                    continue
                took = time.monotonic() - before
                reads.append(read_beside(args, server, label))
                run["rounds"].append({"workload": label, "server": server.kind.name, "number": round_number, "others_busy": others_busy,
                                      "read_gb_s": max(filter(None, reads), default=None), "round": got})
                print(f"{round_number} {label:16} {server.kind.name:16} {got['output_tokens_per_s']:8.1f} out tok/s "
                      f"{got['total_tokens_per_s']:8.0f} total tok/s  ttft {got['ttft_ms']['p50']:.0f} ms  others {100 * others_busy:.0f} %  "
                      f"{took:.0f} s", flush=True)
                save(args.out, run)


def save(out: Path, run: dict):
    keep = {**run, "skipped": sorted(map(list, run["skipped"]))}
    (out / "run.json").write_text(json.dumps(keep, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--peers-dir", type=Path, required=True, help="what install.sh made")
    parser.add_argument("--loramux", type=Path, required=True, help="binary to measure; a copy, so that no build replaces it")
    parser.add_argument("--bench", type=Path, help="binary with `bench`; default: --loramux")
    parser.add_argument("--machine", type=Path, help="program made from onednn/machine.cpp: measures the ceilings first")
    parser.add_argument("--read-gb-s", type=float, help="read bandwidth of all cores, measured at a quiet time; wins over --machine's")
    parser.add_argument("--peers", default="vllm,llama.cpp", help="which to start")
    parser.add_argument("--workloads", help=f"of {','.join(WORKLOADS)}; default: all")
    parser.add_argument("--skip", default="", help="SERVER=WORKLOAD,.. that are left out, such as 'vllm lora=base'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="starts of each server; the first is not counted where there are more")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests; below 1 for a quick look")
    parser.add_argument("--own-scale", type=float, default=1.0, help="of the number of loramux's requests, on top: it needs less time for one")
    parser.add_argument("--warmup", type=int, help="requests before each round; default: as many as run at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.bench = args.bench or args.loramux
    args.out.mkdir(parents=True, exist_ok=True)
    places = Places(args.model.resolve(), args.peers_dir.resolve(), args.loramux.resolve(), args.threads)
    pairs = [pair.rpartition("=") for pair in args.skip.split(",") if pair]
    run = {"schema": "loramux-peers/1", "started_unix_s": int(time.time()), "machine": machine(args.machine), "servers": [], "rounds": [],
           "failures": [], "skipped": {(workload, server) for server, _, workload in pairs}, "scale": args.scale, "own_scale": args.own_scale}
    if args.read_gb_s:
        run["machine"]["read_gb_s"] = args.read_gb_s
    found = kinds(places, [peer for peer in args.peers.split(",") if peer])
    servers: list[Server] = []
    # A run that is told to stop ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        times = start_all(found, args.out, args.starts, servers)
        checks = {server.kind.name: check_adapters(server) for server in servers}
        run["agreement"] = agreement(checks)
        print("\n".join(run["agreement"]), flush=True)
        idle = {server.kind.name: wait_idle(server) for server in servers}
        for server in servers:
            run["servers"].append({"name": server.kind.name, "peer": server.kind.peer, "command": server.kind.command, "env": server.kind.env,
                                   "start_to_ready_s": times[server.kind.name], "idle_cpu": idle[server.kind.name], "memory": server.memory()})
        measure(args, servers, run)
    finally:
        # A run that was stopped reports what it has.
        for server, entry in zip(servers, run["servers"]):
            entry["memory"] = server.memory()
        for server in servers:
            server.stop()
        if run["rounds"]:
            save(args.out, run)
            text = targets.report(run)
            (args.out / "report.md").write_text(text + "\n")
            print(text, flush=True)
    return 1 if run["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
