#!/usr/bin/env python
"""A RetinaNet head with per-level BatchNorm: before and after bn_det.fuse, and without norm.

The torchvision host's head (4 convolutions in each of its two towers) on the levels p3 to p7 of one
image, in inference mode. Rounds of the three forms are interleaved, and ratios are medians of those
within a round, so that drifts cancel. Fused, each level has its own weights: that costs memory
("fused_mb" against "none_mb", of parameters and buffers), and reading them costs time where a level
is small.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bn_det import DomainBatchNorm2d, fuse
from bn_det.tv.retinanet import BNRetinaNetHead
from timing import seconds

NUM_LEVELS, NUM_ANCHORS, NUM_CLASSES, NUM_CONVS = 5, 9, 80, 4
WARM_UP = 3


def make_heads(channels: int) -> dict[str, nn.Module]:
    """The three forms by name; "bn" has statistics and an affine that matter."""

    def make(norm: partial | None) -> nn.Module:
        torch.manual_seed(0)
        return BNRetinaNetHead(channels, NUM_ANCHORS, NUM_CLASSES, NUM_CONVS, norm).eval()

    bn = make(partial(DomainBatchNorm2d, num_domains=NUM_LEVELS))
    for name, t in (*bn.named_parameters(), *bn.named_buffers()):
        if name.endswith("running_var"):  # about that of the convolutions' outputs
            t.data.uniform_(0.1, 0.4)
        elif name.endswith(("running_mean", "bias")):
            t.data.uniform_(-0.1, 0.1)
    fused = copy.deepcopy(bn)
    if left := fuse(fused).left:
        raise RuntimeError(f"not fused: {left}")
    return {"bn": bn, "fused": fused, "none": make(None)}


def megabytes(model: nn.Module) -> float:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6


def time_heads(
    heads: dict[str, nn.Module], levels: list[Tensor], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each round after the warm-up, by form."""
    times = {name: [] for name in heads}
    for k in range(WARM_UP + rounds):
        names = list(heads)
        names = names[k % len(names) :] + names[: k % len(names)]  # each comes after each other
        for name in names:
            ms = 1e3 * seconds(lambda head=heads[name]: head(levels))
            if k >= WARM_UP:
                times[name].append(ms)
    return times


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference over the largest value, of logits or deltas."""
    return max(float((found[name] - y).abs().max() / y.abs().max()) for name, y in expected.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=30, help="that count")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument(
        "--size", type=int, nargs=2, default=[640, 800], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    heads = {name: head.to(args.device) for name, head in make_heads(args.channels).items()}
    sizes = [[-(-side // 2**k) for side in args.size] for k in range(3, 3 + NUM_LEVELS)]
    torch.manual_seed(0)
    levels = [torch.randn(1, args.channels, *size, device=args.device) for size in sizes]
    with torch.inference_mode():
        error = relative_error(heads["fused"](levels), heads["bn"](levels))
        times = time_heads(heads, levels, args.rounds)

    def over_none(name: str) -> float:
        pairs = zip(times[name], times["none"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    result = {
        **{f"{name}_ms": statistics.median(of_form) for name, of_form in times.items()},
        "fused_over_none": over_none("fused"),
        "bn_over_none": over_none("bn"),
        "max_rel_error": error,
        "fused_mb": megabytes(heads["fused"]),
        "none_mb": megabytes(heads["none"]),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(tabulate(list(result.items()), floatfmt=".4g"))


if __name__ == "__main__":
    main()
