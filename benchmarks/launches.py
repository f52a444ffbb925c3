#!/usr/bin/env python
"""The launches of a BatchNorm of five levels on a GPU, by Triton's kernels and by ATen's alone.

Counted without a GPU, on meta tensors, which take the ways of one: each of Triton's kernels, and
each call of ATen that is no view and no allocation. On a GPU a call of ATen may be more than one.
A case is whose samples normalize, whose statistics are kept, and whether weight and bias are
shared.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bn_det import DomainBatchNorm2d
from bn_det.layers import kernels
from pyramid import SIZES

_NO_LAUNCH = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "promote_types"),
    *("alias", "detach", "select", "slice", "split", "split_with_sizes", "unbind", "unsqueeze"),
    *("view", "_unsafe_view", "expand", "squeeze", "transpose", "permute"),
}
CHOICES = list(itertools.product(("shared", "per_domain"), repeat=3))


class Launched(TorchDispatchMode):
    """Counts launches by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _NO_LAUNCH:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def without_a_gpu(launch: Callable[..., None]) -> Iterator[None]:
    """A block in which a function launches Triton's kernels, and ATen has all of its on meta."""
    from bn_det.layers import triton_lists

    def batch_norm_update_stats(x: Tensor, mean: Tensor | None, var: Tensor | None, m: float):
        return tuple(torch.empty(2, x.shape[1], device=x.device))

    real, triton_lists._launch = triton_lists._launch, launch
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("batch_norm_update_stats", batch_norm_update_stats, "Meta")
            yield
    finally:
        triton_lists._launch = real


def count(choices: tuple[str, str, str], implementation: str) -> tuple[Counter, Counter]:
    """The launches forward and backward by name."""
    names = ("statistics", "population", "affine")
    layer = DomainBatchNorm2d(256, len(SIZES), **dict(zip(names, choices, strict=True))).to("meta")
    xs = [torch.empty(2, 256, h, w, device="meta", requires_grad=True) for h, w in SIZES]
    grads = [torch.empty_like(x) for x in xs]
    launched = Launched()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.by_name[kernel.fn.__name__] += 1

    with without_a_gpu(launch), kernels.implementation(implementation):
        with launched:
            ys = layer(xs)
        forward = launched.by_name.copy()
        with launched:
            torch.autograd.grad(ys, [*xs, *layer.parameters()], grads)
    return forward, launched.by_name - forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--names", action="store_true", help="of each launch, in the tables")
    args = parser.parse_args()
    counted = {
        name: {"-".join(choices): count(choices, name) for choices in CHOICES}
        for name in ("triton", "aten")
    }
    if args.json:
        result = {
            name: {
                way: {case: sum(of[k].values()) for case, of in cases.items()}
                for k, way in enumerate(("forward", "backward"))
            }
            for name, cases in counted.items()
        }
        print(json.dumps(result))
        return
    for name, cases in counted.items():
        rows = [[case, *(sum(of.values()) for of in pair)] for case, pair in cases.items()]
        print(tabulate(rows, [name, "forward", "backward"]))
        for case, pair in cases.items() if args.names else ():
            print(case, *(dict(of) for of in pair), sep="\n  ")


if __name__ == "__main__":
    main()
