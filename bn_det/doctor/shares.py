"""How sets of values that share statistics differ: levels, sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.moments import Moments


class Share(NamedTuple):
    """Of a layer's variance, what lies between its calls in a pass and not in them.

    Attributes:
        calls: in a pass.
        share: mean over passes and channels.
        by_noise: what of it the noise of each call's batch explains.
        error: standard error of the share.
        passes: that have been seen.
    """

    calls: int
    share: float
    by_noise: float
    error: float
    passes: int

    @property
    def excess(self) -> float:
        """What noise does not explain; negative by chance."""
        return self.share - self.by_noise


def share_of(passes: Sequence[Sequence[Moments]]) -> Share:
    """Of two passes or more, each with as many calls."""
    counts, means, variances = stacked(passes)
    weights = (counts / counts.sum(1, keepdim=True)).unsqueeze(2)  # passes, calls, channels
    mean = (weights * means).sum(1, keepdim=True)
    between = (weights * (means - mean).square()).sum(1)
    total = between + (weights * variances).sum(1)
    shares = _ratio(between, total).mean(1)
    # By differences of successive passes, as the weights of a training move on.
    noise = (means[1:] - means[:-1]).square().mean(0) / 2
    by_noise = _ratio((weights.mean(0) * noise).sum(0), total.mean(0)).mean()
    error = shares.std() / len(shares) ** 0.5
    share, expected, off = torch.stack([shares.mean(), by_noise, error]).tolist()
    return Share(counts.shape[1], share, expected, off, len(passes))


def stacked(passes: Sequence[Sequence[Moments]]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, shape (passes, calls), means and variances, (passes, calls, C); float64."""
    stacks = [Moments.stack(of_pass) for of_pass in passes]
    counts, means, variances = (torch.stack(field).double() for field in zip(*stacks, strict=True))
    return counts, means, variances


def between_sources(passes: Sequence[Sequence[Moments | None]]) -> tuple[float, float]:
    """The share of a variance that lies between sources, over all passes, and its standard error.

    By the jackknife over passes (Efron & Stein, *The jackknife estimate of variance*, 1981), which
    also takes off what chance adds, as a share is never negative.

    Args:
        passes: of each pass what is of each source, None where nothing is; each source is in two
            passes at least.
    """
    num = len(passes)
    whole = _share_between(passes)
    left_out = torch.stack([_share_between([*passes[:k], *passes[k + 1 :]]) for k in range(num)])
    error = math.sqrt((num - 1) * float(left_out.var(correction=0)))
    return float(num * whole - (num - 1) * left_out.mean()), error


def _share_between(passes: Sequence[Sequence[Moments | None]]) -> Tensor:
    sources = [Moments.merge([m for m in of if m is not None]) for of in zip(*passes, strict=True)]
    counts, means, variances = (of[0] for of in stacked([sources]))
    weights = (counts / counts.sum()).unsqueeze(1)
    between = (weights * (means - (weights * means).sum(0)).square()).sum(0)
    return _ratio(between, between + (weights * variances).sum(0)).mean()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A channel without variance counts as 0."""
    return torch.where(whole > 0, part / whole, 0.0)
