"""Mergeable moments: the one operation behind most ways to choose a normalization batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import all_gather
from .kernels import mean_var


class Moments(NamedTuple):
    """Count, mean and biased variance of each channel over a set of values.

    Moments of disjoint sets merge into the moments of their union (Chan, Golub & LeVeque,
    *Updating formulae and a pairwise algorithm for computing sample variances*, 1979). No gradient
    flows through them.

    Attributes:
        count: number of values per channel, a float64 scalar. Zero for an empty set, whose mean
            and variance are zero by convention and weigh nothing in a merge.
        mean: shape (C,); float32 for inputs of lower precision, else the input's dtype.
        var: biased variance, same shape and dtype.
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of a tensor of shape (N, C, *), over all dimensions but C.

        Raises:
            ValueError: x has fewer than two dimensions, or is not floating point.
        """
        return cls.of_each([x])[0]

    @classmethod
    @torch.no_grad()
    def of_each(cls, xs: Sequence[Tensor]) -> list[Moments]:
        """Those of several tensors; see :meth:`of`."""
        counts = [_count(x) for x in xs]
        return [cls(n, *of_x) for n, of_x in zip(counts, mean_var(xs), strict=True)]

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Moments of the union of disjoint sets. Empty sets change nothing.

        Raises:
            ValueError: there is nothing to merge.
        """
        if not parts:
            raise ValueError("nothing to merge: parts is empty")
        if len(parts) == 1:
            return parts[0]
        return _merge(*(torch.stack(field) for field in zip(*parts, strict=True)))

    @classmethod
    def all_reduce(cls, parts: Sequence[Moments], group: dist.ProcessGroup) -> list[Moments]:
        """Each of several moments merged over the ranks of a group, in one collective.

        Args:
            parts: as many on every rank, with the same number of channels. Any may be empty.

        Returns:
            the same on every rank, to the bit.
        """
        fields = [torch.stack(field) for field in zip(*parts, strict=True)]
        counts, means, variances = fields[0].unsqueeze(1), *fields[1:]
        packed = torch.cat([counts, means.double(), variances.double()], 1)
        counts, means, variances = all_gather(packed, group).split(
            [1, means.shape[1], means.shape[1]], 2
        )
        merged = _merge(counts.squeeze(2), means, variances)
        dtype = parts[0].mean.dtype
        return [
            cls(count, mean.to(dtype), var.to(dtype))
            for count, mean, var in zip(*merged, strict=True)
        ]

    @property
    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction, what an EMA averages; zero for fewer than two."""
        correction = self.count / (self.count - 1).clamp(min=1)
        return self.var * correction.to(self.var.dtype)


def _count(x: Tensor) -> Tensor:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"moments need a floating point tensor of shape (N, C, *), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    size = x.numel() // max(x.shape[1], 1)
    return torch.full((), size, dtype=torch.float64, device=x.device)


def _merge(counts: Tensor, means: Tensor, variances: Tensor) -> Moments:
    """Merge over the first dimension: counts of shape (n, *), means and variances (n, *, C)."""
    # Float64 costs nothing at this size, and keeps a merge of many from drifting.
    dtype, means, variances = means.dtype, means.double(), variances.double()
    total = counts.sum(0)
    weights = (counts / total.clamp(min=1)).unsqueeze(-1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return Moments(total, mean.to(dtype), var.to(dtype))
