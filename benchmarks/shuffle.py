#!/usr/bin/env python
"""Shuffling of RoI features across processes: ours, and by gathering everything everywhere.

There and back, forward plus backward, on CPU processes of one thread each that gloo connects. The
gather-everything form is the usual one (MoCo's shuffling with gradients): each process gathers all
samples and takes its share, then gathers all results and takes its own; the gradient of a gather
is the all-reduced gradient of everything. It is spared the padding that uneven batches would need.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from bn_det import shuffle

Form = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> tuple[Tensor, ...]:
        everything = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everything, x)
        return tuple(everything)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        everything = torch.stack(grads)
        dist.all_reduce(everything)
        return everything[dist.get_rank()]


def gather_everything(
    x: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """As ``bn_det.shuffle``, where all ranks have the same number of samples.

    Args:
        order: the permutation, otherwise a random one.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everything = torch.cat(_AllGather.apply(x))
    if order is None:
        order = torch.randperm(len(everything))
        dist.broadcast(order, 0)

    def restore(y: Tensor) -> Tensor:
        return torch.cat(_AllGather.apply(y))[order.argsort().view(world_size, -1)[rank]]

    return everything[order.view(world_size, -1)[rank]], restore


def run(form: Form, x: Tensor, grad: Tensor) -> None:
    """Forward and backward pass of the way there and back, with nothing in between."""
    mixed, restore = form(x)
    torch.autograd.grad(restore(mixed), x, grad)


def time_form(form: Form, x: Tensor, grad: Tensor, warm_up: int, rounds: int) -> list[float]:
    """Milliseconds that each of the rounds after the warm-up takes until all ranks are done."""
    times = []
    for _ in range(warm_up + rounds):
        dist.barrier()
        start = time.perf_counter()
        run(form, x, grad)
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
    return times[warm_up:]


def max_error(x: Tensor, grad: Tensor) -> float:
    """Largest difference between the two forms, with the same permutation, on any rank.

    Of the mixed samples, of what comes back of a function that mixes them, and of its gradient.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(world_size * len(x)).view(world_size, -1)[rank]
    torch.manual_seed(0)
    order = torch.cat(_AllGather.apply(shuffle(numbers)[0]))
    torch.manual_seed(0)
    results = []
    for mixed, restore in (shuffle(x), gather_everything(x, order)):
        y = restore(mixed * (mixed - mixed.mean(0)))
        results.append([mixed, y, *torch.autograd.grad(y, x, grad)])
    error = torch.stack([(a - b).abs().max() for a, b in zip(*results, strict=True)]).max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


class ReceivedBytes(TorchDispatchMode):
    """What the collectives receive from other ranks, with the ring algorithms that gloo has."""

    total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.total += self._received(func._opname, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _received(name: str, args: tuple) -> float:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if name == "alltoall_base_":
            output, _, _, counts, _ = args[:5]
            return (sum(counts) - counts[rank]) * output[:1].nbytes
        if name == "_allgather_base_":
            return (world_size - 1) * args[1].nbytes
        if name == "allgather_":
            return (world_size - 1) * args[1][0].nbytes
        if name == "allreduce_":
            return 2 * (world_size - 1) / world_size * args[0][0].nbytes
        if name == "broadcast_":
            return args[0][0].nbytes if rank else 0
        raise NotImplementedError(name)


def received_bytes(form: Form, x: Tensor, grad: Tensor) -> int:
    """Bytes that a rank receives in one pass, the mean over ranks."""
    with ReceivedBytes() as mode:
        run(form, x, grad)
    total = torch.tensor(mode.total)
    dist.all_reduce(total)
    return round(total.item() / dist.get_world_size())


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One rank; the first writes the result."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=args.world_size,
    )
    x = torch.randn(args.rois, args.channels, 7, 7, requires_grad=True)
    grad = torch.randn_like(x)
    forms = {"gather": gather_everything, "shuffle": shuffle}
    times: dict[str, list[float]] = {name: [] for name in forms}
    error = max_error(x, grad)
    # By turns, so that both meet the same load of the machine; each turn is of one form alone, as
    # in training, because how much memory the allocator holds warm depends on what ran before.
    for _ in range(3):
        for name, form in forms.items():
            times[name] += time_form(form, x, grad, args.warm_up, args.rounds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    received = {name: received_bytes(form, x, grad) for name, form in forms.items()}
    result = {
        "world_size": args.world_size,
        "gather_ms": medians["gather"],
        "shuffle_ms": medians["shuffle"],
        "speedup": medians["gather"] / medians["shuffle"],
        "bytes_received_gather": received["gather"],
        "bytes_received_shuffle": received["shuffle"],
        "max_abs_error": error,
    }
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()  # so that none leaves while others still exchange something
    dist.destroy_process_group()
    # Of torch 2.14 some one in twenty aborts at its end ("terminate called without an active
    # exception"), when all is done.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--world-size", type=int, default=2, help="number of processes")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count, of each turn")
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before them")
    parser.add_argument("--rois", type=int, default=512, help="samples of each process")
    parser.add_argument("--channels", type=int, default=256)
    args = parser.parse_args()
    if args.world_size < 2:
        parser.error(f"--world-size: {args.world_size} is not accepted; use 2 or more")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args, folder), args.world_size)
        result = json.loads(Path(folder, "result.json").read_text())
    if args.json:
        print(json.dumps(result))
        return
    rows = [
        [name, result[f"{name}_ms"], result[f"bytes_received_{name}"] / 2**20]
        for name in ("gather", "shuffle")
    ]
    print(tabulate(rows, ["form", "ms", "MiB received"], floatfmt=".1f"))
    print(tabulate(list(result.items()), floatfmt=".3g"))


if __name__ == "__main__":
    main()
