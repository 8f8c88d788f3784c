#!/usr/bin/env python3
"""Makes random LoRA adapters for load tests; needs only the standard library.

    python make_adapters.py MODEL OUT --n 100 --ranks 8,16,64 --modules q_proj,v_proj

MODEL is a config.json or the folder that holds it. Adapter i goes to OUT/<prefix>i and has rank ranks[i % len(ranks)]. `--gain` is
the size of what the adapter adds, relative to the module's input. The same arguments make the same bytes.
"""

import argparse
import json
from pathlib import Path

from adapter_files import ALL_MODULES, write_random_adapter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--ranks", default="16", help="comma-separated")
    parser.add_argument("--modules", default="all", help="all, or names such as q_proj,v_proj")
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", default="a")
    args = parser.parse_args()
    path = args.model / "config.json" if args.model.is_dir() else args.model
    config = json.loads(path.read_text())
    ranks = [int(rank) for rank in args.ranks.split(",")]
    modules = ALL_MODULES if args.modules == "all" else tuple(args.modules.split(","))
    total = 0
    for i in range(args.n):
        total += write_random_adapter(args.out / f"{args.prefix}{i}", config, ranks[i % len(ranks)], modules,
                                      seed=args.seed * 1_000_003 + i, gain=args.gain)
    print(f"{args.n} adapters in {args.out}, ranks {ranks}, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
