"""One set of population statistics from those of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError, choose
from ..layers.comm import Group, all_gather, check_agreement, process_group
from ..layers.freeze import is_frozen
from ..layers.kinds import unwrapped
from ..layers.types import NormWithStatistics, has_statistics

HOW = ("averaged", "pooled")
"""Of variances: their mean over ranks; or that of all ranks' values together."""


@torch.no_grad()
def average_population_statistics(
    model: nn.Module, group: Group = "world", how: str = "averaged"
) -> None:
    """Give every rank the same population statistics, made of all ranks' EMAs, in place.

    With BatchNorm of each process by itself, every rank has its own EMA, and a checkpoint holds
    rank 0's. All of them estimate the mean and the expected variance of one process's batch; so
    does their average, from as many times the data. A rank weighs by the batches that its layer has
    tracked (``num_batches_tracked``), so that one which has tracked none counts for nothing; where
    no rank has, or there is no counter, all weigh alike. The counter becomes the ranks' mean.

    Every rank of the group has to call it. Afterwards ranks are equal to the bit. Layers are
    matched by their names; those without population statistics, and frozen ones, are left alone.
    Three collectives.

    Args:
        how: "averaged", the mean of the ranks' variances, as an EMA averages those of batches; or
            "pooled", the variance of all ranks' values together, which counts how the ranks' means
            differ, too: that of another, larger normalization batch.

    Raises:
        InputError: on every rank, if ranks have other layers than each other, or one of them has
            statistics that are NaN or infinite. Nothing is changed then.
    """
    choose("how", how, HOW)
    group = process_group(group)
    layers = _layers(unwrapped(model))
    if group is None:
        return
    names = {name: f"{layer.num_features} channels" for name, layer in layers.items()}
    known = {"layers with population statistics": list(names), **names}
    check_agreement("average_population_statistics", known, group)
    if not layers:
        return
    own = torch.cat([_flat(layer) for layer in layers.values()])
    sizes = [2 * layer.num_features + 1 for layer in layers.values()]
    every = all_gather(own, group).split(sizes, 1)
    merged = []
    for name, layer, of_ranks in zip(layers, layers.values(), every, strict=True):
        merged.append(_merged(_OfRanks.of(of_ranks, layer.num_features), name, how))
    for layer, (count, mean, var) in zip(layers.values(), merged, strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(count.round())


class _OfRanks(NamedTuple):
    """A layer's statistics on each rank; float64.

    Attributes:
        counts: shape (ranks,), the batches tracked.
        means, variances: shape (ranks, C).
    """

    counts: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, flat: Tensor, channels: int) -> _OfRanks:
        counts, means, variances = flat.split([1, channels, channels], 1)
        return cls(counts.squeeze(1), means, variances)


def _layers(model: nn.Module) -> dict[str, NormWithStatistics]:
    """By name, in its order, which is the same on all ranks that have the same layers."""
    frozen = {inner for m in model.modules() if is_frozen(m) for inner in m.modules()}
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and has_statistics(m) and m not in frozen
    }
    return dict(sorted(layers.items()))


def _flat(layer: NormWithStatistics) -> Tensor:
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    counts = mean.new_zeros(1) if count is None else count.view(1)
    return torch.cat([t.double() for t in (counts, mean, var)])


def _merged(of: _OfRanks, name: str, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance. Each rank adds up the same numbers in the same order."""
    counts = of.counts if of.counts.any() else torch.ones_like(of.counts)
    weights = (counts / counts.sum()).unsqueeze(1)
    counted = weights.squeeze(1) > 0
    _check_finite(of, counted, name)
    means, variances, weights = of.means[counted], of.variances[counted], weights[counted]
    mean = (weights * means).sum(0)
    if how == "pooled":
        variances = variances + (means - mean).square()
    return of.counts.mean(), mean, (weights * variances).sum(0)


def _check_finite(of: _OfRanks, counted: Tensor, name: str) -> None:
    finite = torch.cat([of.means, of.variances], 1).isfinite().all(1)
    broken: Sequence[int] = (~finite & counted).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"average_population_statistics: {name}: statistics of rank {broken[0]} are NaN or "
            "infinite; nothing is changed"
        )
