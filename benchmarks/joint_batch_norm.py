#!/usr/bin/env python
"""Shared normalization of a feature pyramid: ours, by concatenation, and five separate BNs.

Forward plus backward of the 256-channel levels p3 to p7 of a 640x800 image, batch 2, with
contiguous outputs, as the next convolution needs them. Peak memory is what a pass allocates beside
its inputs and the gradients of its outputs.
"""

from __future__ import annotations

import argparse
import json

from tabulate import tabulate

from counting import peak_memory
from pyramid import FORMS, Pass, make_levels, max_error
from timing import median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    levels = make_levels(args.batch, args.channels, args.device)
    passes = {
        name: Pass(make(args.channels).to(args.device), *levels) for name, make in FORMS.items()
    }
    error = max_error(passes["joint"], passes["concat"])
    times = median_ms(passes, args.rounds)
    memory = {name: peak_memory(a_pass, args.device) for name, a_pass in passes.items()}
    result = {
        "concat_ms": times["concat"],
        "joint_ms": times["joint"],
        "per_level_ms": times["per_level"],
        "speedup_over_concat": times["concat"] / times["joint"],
        "ratio_to_per_level": times["joint"] / times["per_level"],
        "max_abs_error": error,
        "extra_memory_ratio": memory["concat"] / memory["joint"],
    }
    if args.json:
        print(json.dumps(result))
        return
    rows = [[name, times[name], memory[name] / 2**20] for name in passes]
    print(tabulate(rows, ["form", "ms", "peak extra MiB"], floatfmt=".2f"))
    print(tabulate(list(result.items()), floatfmt=".3g"))


if __name__ == "__main__":
    main()
