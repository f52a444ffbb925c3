#!/usr/bin/env python
"""Shared normalization of a feature pyramid: ours, by concatenation, and five separate BNs.

Forward plus backward of the 256-channel levels p3 to p7 of a 640x800 image, batch 2, with
contiguous outputs, as the next convolution needs them. Peak memory is what a pass allocates beside
its inputs and the gradients of its outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bn_det import DomainBatchNorm2d

SIZES = [(80, 100), (40, 50), (20, 25), (10, 13), (5, 7)]
"""Height and width of p3 to p7."""

Form = Callable[[list[Tensor]], list[Tensor]]


def make_forms(channels: int, device: str) -> dict[str, tuple[Form, list[nn.Parameter]]]:
    """The three forms by name, each with its parameters."""
    joint = DomainBatchNorm2d(channels, len(SIZES), statistics="shared", population="shared")
    single = nn.BatchNorm2d(channels)
    separate = nn.ModuleList(nn.BatchNorm2d(channels) for _ in SIZES)
    for module in (joint, single, separate):
        module.to(device)

    def concat(xs: list[Tensor]) -> list[Tensor]:
        joined = torch.cat([x.flatten(2) for x in xs], 2).unsqueeze(3)
        parts = single(joined).split([x.shape[2] * x.shape[3] for x in xs], 2)
        return [y.reshape(x.shape).contiguous() for x, y in zip(xs, parts, strict=True)]

    def per_level(xs: list[Tensor]) -> list[Tensor]:
        return [bn(x) for bn, x in zip(separate, xs, strict=True)]

    return {
        "joint": (joint, list(joint.parameters())),
        "concat": (concat, list(single.parameters())),
        "per_level": (per_level, list(separate.parameters())),
    }


def run(form: Form, parameters: list[Tensor], xs: list[Tensor], grads: list[Tensor]) -> list:
    """Outputs and gradients of one forward and backward pass."""
    ys = form(xs)
    return [ys, torch.autograd.grad(ys, [*xs, *parameters], grads)]


def time_forms(forms: dict, xs: list[Tensor], grads: list[Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each form, over three turns of 12 rounds of warm-up and then rounds.

    A turn is of one form alone: how much memory the allocator holds warm depends on what ran
    before, and in training that is the same every time.
    """
    times = {name: [] for name in forms}
    for _ in range(3):
        for name, (form, parameters) in forms.items():
            for k in range(12 + rounds):
                _synchronize(xs[0])
                start = time.perf_counter()
                run(form, parameters, xs, grads)
                _synchronize(xs[0])
                if k >= 12:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(form: Form, parameters: list, xs: list[Tensor], grads: list[Tensor]) -> int:
    """Most bytes that a pass holds at once beside what was there before."""
    if xs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(form, parameters, xs, grads)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(form, parameters, xs, grads)
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def max_error(forms: dict, xs: list[Tensor], grads: list[Tensor]) -> float:
    """Largest difference of outputs and input gradients between ours and concatenation."""
    found, expected = (run(*forms[name], xs, grads) for name in ("joint", "concat"))
    pairs = zip(
        [*found[0], *found[1][: len(xs)]], [*expected[0], *expected[1][: len(xs)]], strict=True
    )
    return max((a - b).abs().max().item() for a, b in pairs)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shapes = [(args.batch, args.channels, h, w) for h, w in SIZES]
    torch.manual_seed(0)
    xs = [torch.randn(s, device=args.device, requires_grad=True) for s in shapes]
    grads = [torch.randn_like(x) for x in xs]
    forms = make_forms(args.channels, args.device)
    error = max_error(forms, xs, grads)
    times = time_forms(forms, xs, grads, args.rounds)
    memory = {name: peak_memory(*form, xs, grads) for name, form in forms.items()}
    result = {
        "concat_ms": times["concat"],
        "joint_ms": times["joint"],
        "per_level_ms": times["per_level"],
        "speedup_over_concat": times["concat"] / times["joint"],
        "ratio_to_per_level": times["joint"] / times["per_level"],
        "max_abs_error": error,
        "extra_memory_ratio": memory["concat"] / memory["joint"],
    }
    if args.device != "cpu":
        result["time_over_floor"] = times["joint"] / floor_ms(xs)
    if args.json:
        print(json.dumps(result))
        return
    rows = [[name, times[name], memory[name] / 2**20] for name in forms]
    print(tabulate(rows, ["form", "ms", "peak extra MiB"], floatfmt=".2f"))
    print(tabulate(list(result.items()), floatfmt=".3g"))


def floor_ms(xs: list[Tensor]) -> float:
    """Time to move the fewest bytes: twice each input and once the output forward, twice each
    input and output gradient and once the input gradient backward, at the speed of a copy."""
    x = xs[0]
    y = torch.empty_like(x)
    for k in range(30):
        if k == 10:
            _synchronize(x)
            start = time.perf_counter()
        y.copy_(x.detach())
    _synchronize(x)
    per_byte = (time.perf_counter() - start) / 20 / (2 * x.nbytes)
    return 1e3 * per_byte * 8 * sum(x.nbytes for x in xs)


if __name__ == "__main__":
    main()
