"""One set of population statistics from those of several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.comm import Group, all_gather, process_group


@torch.no_grad()
def average_population_statistics(model: nn.Module, group: Group = "world") -> None:
    """Give every rank the mean of all ranks' EMAs, in place, in one collective.

    With BatchNorm of each process by itself, every rank has its own EMA, and a checkpoint holds
    rank 0's. All of them estimate the mean and the expected variance of one process's batch; so
    does their average, from as many times the data. (The variance of all ranks' samples together,
    which also counts how the ranks' means differ, would be that of another normalization batch.)

    Every rank of the group has to call it. Afterwards ranks are equal to the bit. Layers without
    population statistics are left alone.
    """
    group = process_group(group)
    buffers = _population_buffers(model)
    if group is None or not buffers:
        return
    every = all_gather(torch.cat([b.double().flatten() for b in buffers]), group)
    # Each rank adds up the same numbers in the same order.
    means = every.mean(0).split([b.numel() for b in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        mean = mean if buffer.is_floating_point() else mean.round()
        buffer.copy_(mean.view_as(buffer))


def _population_buffers(model: nn.Module) -> list[Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [getattr(layer, name) for layer in layers for name in names]
    return [b for b in buffers if b is not None]
