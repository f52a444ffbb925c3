"""The EMA of population statistics that a layer keeps while it trains.

For any layer with the buffers of ``nn.BatchNorm2d``: ``running_mean`` and ``running_var`` are
moved by the momentum towards the mean and the unbiased variance of each normalization batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from . import kernels
from .moments import Moments
from .types import AnyBatchNorm, NormWithStatistics, WithStatistics

Seen = tuple[AnyBatchNorm, list[int]]
"""A layer, and the numbers of the normalization batches that move its EMA."""


def tracks(layer: AnyBatchNorm) -> TypeGuard[NormWithStatistics]:
    """Whether a call updates the layer's population statistics in its present mode."""
    # torch's own layers have no such choices, and a host's frozen ones not even the last
    updates = getattr(layer, "update_population", True) and not getattr(layer, "frozen", False)
    tracked = getattr(layer, "track_running_stats", False) and layer.running_mean is not None
    return layer.training and updates and tracked


@torch.library.custom_op("bn_det::snapshot", mutates_args=(), schema="(Tensor x) -> Tensor")
def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


@_snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def snapshot(layer: WithStatistics) -> tuple[Tensor, Tensor]:
    """The layer's population statistics as they are now, whatever is updated before they are read.

    A compiled graph may read a buffer again in its backward pass instead of holding what it has
    made of it, and so find what the forward pass has updated (pytorch/pytorch#197039). It does not
    look into an operator of ours.
    """
    return _snapshot(layer.running_mean), _snapshot(layer.running_var)


def count_batch(layer: NormWithStatistics) -> float:
    """Count a batch that updates an EMA; the weight that it has there, 0 in a recomputation."""
    if in_backward_pass():
        return 0.0
    counter = layer.num_batches_tracked
    if counter is not None:
        counter.add_(1)
    if layer.momentum is not None:
        return layer.momentum
    # Cumulative moving average; as nn.BatchNorm2d, it stays where nothing counts.
    return 0.0 if counter is None else 1.0 / float(counter)


@torch.no_grad()
def update(batches: Moments, sizes: Sequence[int], seen: Sequence[Seen]) -> None:
    """Move EMAs towards the mean and the unbiased variance of normalization batches.

    Of several batches, towards the means of theirs, weighted by the number of values. Empty ones
    change nothing.

    Args:
        batches: stacked.
        sizes: values per channel of each, of which only 0 and more are told apart.
        seen: the layers, in the order in which they are to move.
    """
    moving = [(layer, [k for k in rows if sizes[k] > 0]) for layer, rows in seen if tracks(layer)]
    moving = [(layer, rows) for layer, rows in moving if rows]
    if not moving or in_backward_pass():
        return
    layers, sets = zip(*moving, strict=True)
    triton = kernels.one_launch([layer.running_mean for layer in layers], len(batches.mean))
    if triton is not None and all(map(_is_plain, layers)):
        triton.update_emas(batches, sets, layers)
        return
    unbiased = Moments(batches.count, batches.mean, batches.unbiased_var())
    while moving:  # a layer that sees a batch after the other moves as often
        of_round = dict(reversed(moving))
        moving = [pair for pair in moving if pair[1] is not of_round[pair[0]]]
        _move(of_round, unbiased)


def _is_plain(layer: NormWithStatistics) -> bool:
    """Whether it has a counter, and its statistics are all that lies in their memory, in order."""
    buffers = layer.running_mean, layer.running_var
    return layer.num_batches_tracked is not None and all(b.is_contiguous() for b in buffers)


def _move(rows_of: Mapping[NormWithStatistics, Sequence[int]], unbiased: Moments) -> None:
    """Each layer by its batches, all of them in few launches."""
    buffers: list[Tensor] = []
    statistics: list[Tensor] = []
    momenta: list[float] = []
    for layer, rows in rows_of.items():
        buffers += [layer.running_mean, layer.running_var]
        statistics += _averaged([unbiased.row(k) for k in rows])
        momenta += [count_batch(layer)] * 2
    torch._foreach_mul_(buffers, [1 - momentum for momentum in momenta])
    torch._foreach_add_(buffers, torch._foreach_mul(statistics, momenta))


def mean_statistics(batches: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, averaged over batches: not those of the batches merged."""
    return _averaged([m._replace(var=m.unbiased_var()) for m in batches])


def _averaged(batches: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Mean and variance, weighted by the numbers of values."""
    if len(batches) == 1:
        return batches[0].mean, batches[0].var
    counts = torch.stack([m.count for m in batches])
    weights = (counts / counts.sum()).to(batches[0].mean.dtype).unsqueeze(1)
    means = torch.stack([m.mean for m in batches])
    variances = torch.stack([m.var for m in batches])
    return (weights * means).sum(0), (weights * variances).sum(0)


def refuse_recomputation(what: str) -> None:
    """Raise RuntimeError where activation checkpointing repeats a forward pass."""
    if in_backward_pass():
        raise RuntimeError(
            f"{what} cannot be recomputed in a backward pass (activation checkpointing): what it "
            "depends on has changed since the forward pass"
        )


def in_backward_pass() -> bool:
    """Whether autograd runs this forward pass: activation checkpointing's recomputation."""
    # The id is private in name, and what torch.utils.checkpoint itself goes by. A compiled graph
    # writes each buffer once, whatever it recomputes.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
