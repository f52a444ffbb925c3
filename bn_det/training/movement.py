"""What the moves of running statistics in a few steps say of them, and of the batches.

An EMA moves by s' - s = w (b - s). So its state before and after a step tells the statistics b of
the step's batch, whatever layer it is of, and nothing has to look at what the layers see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.kinds import eps_of
from ..population.observation import PopulationLayer


class Snapshot(NamedTuple):
    """Statistics of all places, which are not moved with them.

    Attributes:
        mean, var: shape (all channels,).
        counts: batches tracked, shape (places,); 0 where nothing counts.
    """

    mean: Tensor
    var: Tensor
    counts: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, places: Sequence[PopulationLayer]) -> Snapshot:
        modules = [place.module for place in places]
        device = modules[0].running_mean.device
        counters = [getattr(m, "num_batches_tracked", None) for m in modules]
        none = torch.zeros((), dtype=torch.long, device=device)
        return cls(
            torch.cat([m.running_mean.to(device) for m in modules]),
            torch.cat([m.running_var.to(device) for m in modules]),
            torch.stack([none if c is None else c.to(device) for c in counters]),
        )


class Moves(NamedTuple):
    """Of each place, shape (places,); float64 on the CPU.

    Means are in standard deviations of the layer's input, variances relative to its variance, which
    eps is added to, as where it normalizes; root mean squares over channels. NaN where there is too
    little to tell.

    Attributes:
        updates: of the EMA in a step, at most.
        steps: in which it has moved.
        pairs: of successive ones among them.
        mean_shift, var_shift: how far the running statistics are from the batches', over the steps.
        mean_noise, var_noise: by how much those of a step's batch vary from step to step.
        chance: the standard deviation of a shift, in those of the noise.
        ema_chance: that of a running statistic.
    """

    updates: Tensor
    steps: Tensor
    pairs: Tensor
    mean_shift: Tensor
    var_shift: Tensor
    mean_noise: Tensor
    var_noise: Tensor
    chance: Tensor
    ema_chance: Tensor


def updates_of(befores: Sequence[Snapshot], afters: Sequence[Snapshot]) -> Tensor:
    """How often each place has been updated in each step, shape (steps, places), by its counter."""
    counts = [torch.stack([s.counts for s in of]) for of in (befores, afters)]
    return counts[1] - counts[0]


@torch.no_grad()
def moves(
    places: Sequence[PopulationLayer], befores: Sequence[Snapshot], afters: Sequence[Snapshot]
) -> tuple[Moves, Tensor]:
    """What a window of steps tells, and the variances by which it is relative, (all channels,).

    The noise is that of differences of successive steps (von Neumann, *Distribution of the ratio of
    the mean square successive difference to the variance*, 1941), which weights that change slowly
    do not add to.

    The shift is the mean over steps of b - s, (s_n - s_0) / (n w) in the end. For batches of a
    model that stays as it is, it has the variance 2 (1 - (1 - w)^n) / ((2 - w) w n^2) of theirs.
    """
    channels = [place.module.running_mean.numel() for place in places]
    sizes = torch.tensor(channels, device=befores[0].mean.device)

    def spread(of_places: Tensor) -> Tensor:
        return of_places.repeat_interleave(sizes, -1)

    def by_place(of_channels: Tensor) -> Tensor:
        return torch.stack([part.mean(-1) for part in of_channels.split(channels, -1)], -1)

    def stacked(of: Sequence[Snapshot]) -> list[Tensor]:
        return [torch.stack(field).double() for field in list(zip(*of, strict=True))[:2]]

    before, after = stacked(befores), stacked(afters)
    mean_moved, var_moved = (b != a for b, a in zip(before, after, strict=True))
    has_moved = by_place((mean_moved | var_moved).double()) > 0
    # Not all who move an EMA count (Detectron2's NaiveSyncBatchNorm).
    updates = torch.maximum(updates_of(befores, afters), has_moved.long())
    weights = _weights(places, updates, torch.stack([s.counts for s in afters]))
    valid = (weights > 0) & has_moved
    to_batch = [
        torch.where(spread(valid), (a - b) / spread(weights.clamp(min=1e-12)), 0.0)
        for b, a in zip(before, after, strict=True)
    ]
    batch = [b + d for b, d in zip(before, to_batch, strict=True)]
    steps, follows = valid.sum(0), valid[1:] & valid[:-1]
    pairs = follows.sum(0)
    var = torch.where(spread(valid), batch[1], 0.0).sum(0) / spread(steps.clamp(min=1))
    eps = torch.tensor([eps_of(place.owner) for place in places], device=var.device)
    var = var.clamp(min=0) + spread(eps)
    units = var.sqrt(), var

    def squares(values: Tensor, unit: Tensor) -> Tensor:
        return by_place((values / unit).square())

    shifts = [
        squares(d.sum(0) / spread(steps), unit).sqrt()
        for d, unit in zip(to_batch, units, strict=True)
    ]
    noises = [
        (_summed(squares(b[1:] - b[:-1], unit), follows) / (2 * pairs)).sqrt()
        for b, unit in zip(batch, units, strict=True)
    ]
    n, w = steps.double(), (weights * valid).sum(0) / steps
    chance = (2 * (1 - (1 - w) ** n) / ((2 - w) * w)).sqrt() / n
    ema_chance = (w / (2 - w)).sqrt()
    rows = [updates.amax(0), steps, pairs, *shifts, *noises, chance, ema_chance]
    return Moves(*torch.stack([row.double() for row in rows]).cpu()), var


def _summed(of_steps: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, of_steps, 0.0).sum(0)


def _weights(places: Sequence[PopulationLayer], updates: Tensor, counts: Tensor) -> Tensor:
    """Of the batches of a step, in an EMA that they have updated so often."""
    momenta = [getattr(place.module, "momentum", 0.0) for place in places]
    is_mean = torch.tensor([m is None for m in momenta], device=updates.device)
    m = torch.tensor([m or 0.0 for m in momenta], dtype=torch.float64, device=updates.device)
    return torch.where(is_mean, updates / counts.clamp(min=1), 1 - (1 - m) ** updates)
