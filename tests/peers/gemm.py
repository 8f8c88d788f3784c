#!/usr/bin/env python3
"""Our matrix product against oneDNN's, in turns, so that whatever else runs on the machine disturbs both alike.

    python gemm.py --ours target/release/examples/bench_gemm --onednn DIR/bin/matmul [--threads 2] [--rounds 5] [--json FILE]

Both programs take --shapes, --m and --seconds, and print JSON lines with n, k, m, out, weights (warm or cold), us and us_min. The ratio of
a round is oneDNN's time divided by ours (above 1: we are faster); the median of the rounds counts. `best` compares the fastest call
that each had in the whole run. oneDNN gets its rows in bf16; ours converts from f32 within the time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

WANTED = 0.95
WANTED_ROWS = (16, 64, 256)  # of the rows measured, those that have a target


def run(command: list[str], threads: int, shape: str, m: int, seconds: float) -> dict[str, dict]:
    """(warm or cold) -> line."""
    # What suits an OpenMP program best: a thread for each core, that stays there and waits actively.
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"}
    typed = [*command, "--shapes", shape, "--m", str(m), "--seconds", str(seconds)]
    ran = subprocess.run(typed, capture_output=True, text=True, env=env, timeout=600)
    if ran.returncode != 0:
        raise RuntimeError(f"{shlex.join(typed)}: {ran.stderr[-1000:]}")
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    found = {line["weights"]: line for line in lines if line.get("m") == m and f"{line.get('n')}x{line.get('k')}" == shape and line["out"] == "f32"}
    if not found:
        raise RuntimeError(f"{shlex.join(typed)} printed no line for {shape} m={m}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, help="command of our benchmark")
    parser.add_argument("--onednn", required=True, help="program made from onednn/matmul.cpp")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", default="1536x576,576x1536,4096x4096", help="N x K, outputs by inputs")
    parser.add_argument("--m", default="1,4,16,64,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ours, theirs = shlex.split(args.ours), [*shlex.split(args.onednn), "--out", "f32"]
    rows, missed = [], 0
    print("| N x K | m | weights | ours GFLOP/s | oneDNN GFLOP/s | ratio | best ours | best oneDNN | ratio of best | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, args.m.split(",")):
            pairs = []
            for number in range(args.rounds):
                # The one that begins changes.
                order = [ours, theirs] if number % 2 == 0 else [theirs, ours]
                got = {id(command): run(command, args.threads, shape, m, args.seconds) for command in order}
                pairs.append((got[id(ours)], got[id(theirs)]))
            for weights in ("warm", "cold"):
                gflop = 2e-3 * n * k * m  # divided by microseconds: GFLOP/s
                us = [[pair[side][weights]["us"] for pair in pairs] for side in (0, 1)]
                best = [min(pair[side][weights]["us_min"] for pair in pairs) for side in (0, 1)]
                ratio = statistics.median(b / a for a, b in zip(*us))
                mean = [statistics.median(side) for side in us]
                target = m in WANTED_ROWS and weights == "warm"
                missed += target and ratio < WANTED
                state = ("pass" if ratio >= WANTED else "MISS") if target else ""
                print(f"| {shape} | {m} | {weights} | {gflop / mean[0]:.0f} | {gflop / mean[1]:.0f} | {ratio:.2f} | {gflop / best[0]:.0f} | "
                      f"{gflop / best[1]:.0f} | {best[1] / best[0]:.2f} | {state} |", flush=True)
                rows.append({"n": n, "k": k, "m": m, "weights": weights, "ours_us": us[0], "onednn_us": us[1], "ratio": ratio,
                             "best_us": best, "ratio_of_best": best[1] / best[0]})
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
