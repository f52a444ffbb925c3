#!/usr/bin/env python
"""Synchronized normalization of a RetinaNet head: ours, and a layer for each level.

Forward plus backward of the two towers (convolution, norm, ReLU) over the levels p3 to p7 on
several processes, with the statistics of each level taken over all of them. The baseline calls one
synchronizing layer for each level: on CPU processes Detectron2's NaiveSyncBatchNorm (without
Detectron2 the same algorithm, written below), on GPUs torch.nn.SyncBatchNorm.

And a training step of a RetinaNet with ResNet-50-FPN, all of its BatchNorm over the processes: how
much longer it takes as they find out before each exchange whether they are in the same layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fvcore.nn.distributed import differentiable_all_reduce
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn

from bn_det import BatchNorm2d, DomainBatchNorm2d, convert_batchnorm, name_layers
from bn_det.layers import PerLevel
from counting import collectives
from pyramid import Tower

try:
    from detectron2.layers import NaiveSyncBatchNorm
except ImportError:
    NaiveSyncBatchNorm = None

NUM_LEVELS = 5


class SumSyncBatchNorm(nn.BatchNorm2d):
    """NaiveSyncBatchNorm's algorithm: the mean over ranks of means and of mean squares."""

    def forward(self, x: Tensor) -> Tensor:
        own = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, mean_square = (differentiable_all_reduce(own) / dist.get_world_size()).chunk(2)
        var = mean_square - mean.square()
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def baseline_layer(device: str) -> Callable[[int], nn.Module]:
    """The synchronizing layer that a user has without us."""
    if device == "cuda":
        return nn.SyncBatchNorm
    return NaiveSyncBatchNorm or SumSyncBatchNorm


def measure(rank: int, args: argparse.Namespace, store: str, output: str) -> None:
    """What each process runs; the first one writes the result."""
    torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=Path(store).as_uri(), rank=rank, world_size=args.world_size
    )
    device = f"cuda:{rank}" if args.device == "cuda" else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    ours = partial(DomainBatchNorm2d, num_domains=NUM_LEVELS, affine="per_domain", group="world")
    layer = baseline_layer(args.device)
    theirs = lambda c: PerLevel(layer(c) for _ in range(NUM_LEVELS))  # noqa: E731
    forms = {
        name: nn.ModuleList(Tower(args.channels, norm) for _ in range(2)).to(device)
        for name, norm in (("ours", ours), ("baseline", theirs))
    }
    torch.manual_seed(rank)
    sizes = [max(1, args.size // 2**k) for k in range(3, 3 + NUM_LEVELS)]
    xs = [
        torch.randn(args.batch, args.channels, s, s, device=device, requires_grad=True)
        for s in sizes
    ]
    grads = [torch.randn_like(x) for x in xs]

    def run(name: str) -> list[Tensor]:
        ys = [y for tower in forms[name] for y in tower(xs)]
        inputs = [*xs, *forms[name].parameters()]
        found = torch.autograd.grad(ys, inputs, [*grads, *grads])
        return [*ys, *found[: len(xs)]]

    error = max(
        (a - b).abs().max().item() for a, b in zip(run("ours"), run("baseline"), strict=True)
    )
    times = {name: time_form(partial(run, name), args.rounds) for name in forms}
    counts = {name: collectives(partial(run, name)) for name in forms}
    result = time_step(device, args)
    if rank == 0:
        result |= {
            "baseline": layer.__name__,
            "world_size": args.world_size,
            "ours_ms": times["ours"],
            "baseline_ms": times["baseline"],
            "speedup": times["baseline"] / times["ours"],
            "ours_collectives": counts["ours"],
            "baseline_collectives": counts["baseline"],
            "max_abs_error": error,
        }
        Path(output).write_text(json.dumps(result))
    dist.barrier()  # so that none leaves while others still exchange something
    dist.destroy_process_group()
    # Of torch 2.14 some one in twenty aborts at its end ("terminate called without an active
    # exception"), when all is done.
    os._exit(0)


def time_step(device: str, args: argparse.Namespace) -> dict[str, float]:
    """Of steps with and without meetings, by turns."""
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=args.size, max_size=args.size
    )
    convert_batchnorm(model, partial(BatchNorm2d, group="world")).to(device).train()
    images = list(torch.rand(args.batch, 3, args.size, args.size, device=device))
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]], device=device)
    targets = [{"boxes": boxes, "labels": torch.tensor([1], device=device)}] * args.batch

    def step(timeout: float) -> None:
        name_layers(model, timeout)
        sum(model(images, targets).values()).backward()
        model.zero_grad()

    turns = [[time_form(partial(step, s), 1, 0) for s in (300.0, 0.0)] for _ in range(args.rounds)]
    with_meetings, without = zip(*turns[2:], strict=True)
    return {
        "step_ms": statistics.median(with_meetings),
        "step_without_meetings_ms": statistics.median(without),
        "step_ratio": statistics.median(a / b for a, b in turns[2:]),
    }


def time_form(run: Callable[[], object], rounds: int, warm_up: int = 5) -> float:
    """Median milliseconds of a round in which all processes begin together."""
    times = []
    for k in range(rounds + warm_up):
        dist.barrier()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if k >= warm_up:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--world-size", type=int, default=2, help="number of processes")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="images of each process")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/result.json"
        mp.spawn(measure, (args, f"{folder}/store", output), nprocs=args.world_size)
        result = json.loads(Path(output).read_text())
    if args.json:
        print(json.dumps(result))
    else:
        print(tabulate(list(result.items()), floatfmt=".3g"))


if __name__ == "__main__":
    main()
