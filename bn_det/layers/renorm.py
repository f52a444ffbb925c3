"""Batch renormalization: batch statistics that are corrected towards those of the population."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from .ema import snapshot
from .moments import Moments
from .types import AnyBatchNorm, has_statistics


class RenormLimits(NamedTuple):
    """How far batch renormalization may correct (Ioffe, *Batch Renormalization*, 2017, Sec. 3).

    With (1, 0) it is batch normalization; with (inf, inf) the outputs are those of test time.

    Attributes:
        r_max: of the ratio of standard deviations, batch to population; 1 or more.
        d_max: of the difference of means, in standard deviations of the population; 0 or more.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    def check(self) -> RenormLimits:
        """Itself, if it is a pair of limits; else InputError."""
        if not (self.r_max >= 1 and self.d_max >= 0):
            raise InputError(
                f"renorm: {tuple(self)!r} is not accepted; use (r_max, d_max) with r_max 1 or more "
                "and d_max 0 or more"
            )
        return self


def limits_of(renorm: object) -> RenormLimits:
    """The limits that a layer is given; InputError for what is no pair of them."""
    try:
        limits = RenormLimits(*renorm)  # type: ignore[misc]  # an int has no items
        return limits.check()
    except TypeError:
        raise InputError(f"renorm: {renorm!r} is not accepted; use a pair (r_max, d_max)") from None


def correction(
    moments: Moments, population: AnyBatchNorm, eps: float, limits: RenormLimits
) -> tuple[Tensor, Tensor]:
    """r and d of a normalization batch, each of shape (C,); no gradient flows through them."""
    if not has_statistics(population):
        raise InputError(
            "renorm: not accepted without population statistics; use track_running_stats True"
        )
    mean, var = snapshot(population)
    batch_std, std = (moments.var + eps).sqrt(), (var + eps).sqrt()
    r = (batch_std / std).clamp(1 / limits.r_max, limits.r_max)
    d = ((moments.mean - mean) / std).clamp(-limits.d_max, limits.d_max)
    return r, d


def renormalized(
    weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The affine that turns batch normalization into batch renormalization.

    (z r + d) weight + bias = z (r weight) + (d weight + bias), where z is normalized by the batch.
    """
    if weight is not None:
        r, d = r * weight, d * weight
    return r, d if bias is None else d + bias
