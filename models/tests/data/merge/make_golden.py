"""Numbers of PEFT's merges for `models/src/adapter/merge/combine.rs`.

    python models/tests/data/merge/make_golden.py > models/tests/data/merge/golden.json

Needs torch and peft; written with peft 0.21. DARE draws at random, so only its undrawn half (density 1) is here.
"""

import json
import warnings

import torch
from peft.utils import merge_utils

warnings.simplefilter("ignore")
torch.manual_seed(20)


def rounded(tensor):
    return [float(value) for value in tensor.reshape(-1)]


def main():
    cases = []
    for name, weights in [("two", [0.75, -0.5]), ("three", [1.0, 0.3, 0.6])]:
        free = [torch.randn(4, 6) for _ in weights]
        # Multiples of 1/4, so that elections have ties and zeros. Pruned, equal sizes would be kept in no defined order.
        coarse = [torch.round(part * 4) / 4 for part in free]
        factors = torch.tensor(weights)
        for density in (0.3, 0.7, 1.0):
            parts = coarse if density == 1.0 else free
            for method in ("total", "frequency"):
                merged = merge_utils.ties(parts, factors, density, method)
                cases.append(("ties", name, weights, parts, density, method, merged))
            if density == 1.0:
                merged = merge_utils.dare_ties(parts, factors, density, "total")
                cases.append(("dare_ties", name, weights, parts, density, "total", merged))
                merged = merge_utils.dare_linear(parts, factors, density)
                cases.append(("dare_linear", name, weights, parts, density, "total", merged))
        merged = merge_utils.task_arithmetic(parts, factors)
        cases.append(("linear", name, weights, parts, None, "total", merged))
    keys = ("strategy", "name", "weights", "parts", "density", "sign", "merged")
    rows = [dict(zip(keys, case)) for case in cases]
    for row in rows:
        row["parts"] = [rounded(part) for part in row["parts"]]
        row["merged"] = rounded(row["merged"])
    print("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")


main()
