"""From the rounds of a record run to its table and to what was reached: the targets that docs/performance.md speaks of.

    python targets.py FOLDER      prints both again from a run's folder
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

WEIGHT_BYTES = 134_515_008 * 2  # SmolLM2-135M in bf16; the embedding is the head too, and a step reads all of it


@dataclasses.dataclass
class Figures:
    """Medians over the rounds of one workload on one server."""

    output_tok_s: float
    total_tok_s: float
    ttft_ms: float
    itl_ms: float | None
    rounds: int


def figures(rounds: list[dict]) -> Figures:
    def median(get):
        values = [get(r) for r in rounds]
        return None if None in values else statistics.median(values)

    return Figures(median(lambda r: r["output_tokens_per_s"]), median(lambda r: r["total_tokens_per_s"]), median(lambda r: r["ttft_ms"]["p50"]),
                   median(lambda r: r["itl_ms"]["p50"] if r["itl_ms"] else None), len(rounds))


class Results:
    """Every figure of a run; `best_peer` takes the better of a peer's two instances."""

    def __init__(self, run: dict):
        self.run = run
        grouped: dict[tuple[str, str], list[dict]] = {}
        for entry in run["rounds"]:
            grouped.setdefault((entry["workload"], entry["server"]), []).append(entry["round"])
        self.cells = {at: figures(rounds) for at, rounds in grouped.items()}
        self.peers = {server["name"]: server["peer"] for server in run["servers"]}

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(workload for workload, _ in self.cells))

    def get(self, workload: str, server: str = "loramux") -> Figures | None:
        return self.cells.get((workload, server))

    def others(self, workload: str, peer: str | None = None) -> list[Figures]:
        return [cell for (at, server), cell in self.cells.items() if at == workload and self.peers[server] not in ("loramux",)
                and peer in (None, self.peers[server])]

    def best(self, workload: str, peer: str | None = None, of=lambda cell: cell.output_tok_s) -> float | None:
        return max(map(of, self.others(workload, peer)), default=None)


def row(name: str, value: float | None, wanted: float, at_most: bool = False, note: str = "") -> str:
    if value is None:
        return f"| {name} | not measured | {'<=' if at_most else '>='} {wanted:g} | - | {note} |"
    good = value <= wanted if at_most else value >= wanted
    return f"| {name} | {value:.3g} | {'<=' if at_most else '>='} {wanted:g} | {'pass' if good else 'MISS'} | {note} |"


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def memory_limit(run: dict) -> list[str]:
    """Each round of one stream against the read bandwidth measured just before and after it, or else at the start."""
    shares, reads = [], []
    for entry in run["rounds"]:
        if (entry["workload"], entry["server"]) == ("base-1", "loramux"):
            read = entry.get("read_gb_s") or run["machine"].get("read_gb_s")
            if read:
                reads.append(read)
                shares.append(1e3 / entry["round"]["itl_ms"]["p50"] / (read * 1e9 / WEIGHT_BYTES))
    if not shares:
        return []
    rates = ", ".join(f"{read:.1f}" for read in reads)
    return [row("base at 1, of the memory limit", statistics.median(shares), 0.65, note=f"decode steps/s at the median gap; reads in GB/s: {rates}")]


def verdict(results: Results) -> list[str]:
    def ours(workload, of=lambda cell: cell.output_tok_s):
        cell = results.get(workload)
        return of(cell) if cell else None

    def total(cell):
        return cell.total_tok_s

    lines = ["| target | measured | wanted | | note |", "|---|---|---|---|---|"]
    lines.append(row("16 distinct adapters, against the best peer", ratio(ours("distinct"), results.best("distinct")), 4, note="stretch 8"))
    lines.append(row("16 distinct adapters, against our base", ratio(ours("distinct"), ours("base")), 0.85))
    lines.append(row("one adapter at 16, against our base", ratio(ours("one"), ours("base")), 0.93))
    lines.append(row("prefill of 128 with one adapter, against our base", ratio(ours("prefill-128-one", total), ours("prefill-128", total)), 0.9))
    lines.append(row("base at 1, against the best peer", ratio(ours("base-1"), results.best("base-1")), 1.2))
    lines.append(row("base at 16, against the best peer", ratio(ours("base"), results.best("base")), 1.2))
    lines += memory_limit(results.run)
    lines.append(row("prefill of 1024 x 4, against vLLM", ratio(ours("prefill-1024", total), results.best("prefill-1024", "vllm", total)), 1.0))
    for workload in results.workloads():
        fastest = min((cell.ttft_ms for cell in results.others(workload)), default=None)
        lines.append(row(f"TTFT p50 of {workload}, against the best peer", ratio(ours(workload, lambda cell: cell.ttft_ms), fastest), 1.0, True))
    servers = {server["name"]: server for server in results.run["servers"]}
    mine = servers.get("loramux")
    if mine:
        lines.append(row("start to ready, s", statistics.median(mine["start_to_ready_s"]), 2.0, True))
        vllm = [server["memory"]["rss"] for server in servers.values() if server["peer"] == "vllm"]
        lines.append(row("resident memory, against vLLM's smaller instance", ratio(mine["memory"]["rss"], min(vllm, default=None)), 1 / 3, True,
                         "RSS over the process tree, after the load"))
    return lines


def table(results: Results) -> list[str]:
    lines = ["| workload | server | output tok/s | total tok/s | TTFT p50 ms | gap p50 ms | rounds |", "|---|---|---|---|---|---|---|"]
    for (workload, server), cell in results.cells.items():
        gap = f"{cell.itl_ms:.2f}" if cell.itl_ms is not None else "-"
        lines.append(f"| {workload} | {server} | {cell.output_tok_s:.1f} | {cell.total_tok_s:.0f} | {cell.ttft_ms:.0f} | {gap} | {cell.rounds} |")
    lines += ["", "| server | start to ready s | RSS MB | PSS MB | idle CPU % |", "|---|---|---|---|---|"]
    for server in results.run["servers"]:
        memory = server["memory"]
        lines.append(f"| {server['name']} | {statistics.median(server['start_to_ready_s']):.2f} | {memory['rss'] / 1e6:.0f} | "
                     f"{memory['pss'] / 1e6:.0f} | {100 * server['idle_cpu']:.1f} |")
    return lines


def report(run: dict) -> str:
    results = Results(run)
    busy = [entry["others_busy"] for entry in run["rounds"]]
    warning = [f"Other programs used {100 * statistics.median(busy):.0f} % of the processors between rounds (median)." if busy else ""]
    return "\n".join([*table(results), "", *warning, "", *verdict(results)])


if __name__ == "__main__":
    print(report(json.loads((Path(sys.argv[1]) / "run.json").read_text())))
