"""Mergeable moments: the one operation behind most ways to choose a normalization batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .aten_kernels import merged_rows
from .comm import gather_into
from .meeting import Meeting

if TYPE_CHECKING:
    from .triton_lists import Grid


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

    Those of n sets may be stacked: shapes (n,), (n, C) and (n, C).
    """

    count: Tensor  # type: ignore[assignment]  # in place of tuple.count, which nothing asks for
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of a tensor of shape (N, C, *), over all dimensions but C.

        Raises:
            ValueError: x has fewer than two dimensions, or is not floating point.
        """
        return Parts.of([x], kernels.grid_of([x])).merge([[0]]).row(0)

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
        return cls(*merged_rows(*cls.stack(parts)))

    @classmethod
    def stack(cls, rows: Sequence[Moments]) -> Moments:
        """Those of several sets, stacked."""
        return cls(*(torch.stack(field) for field in zip(*rows, strict=True)))

    def row(self, number: int) -> Moments:
        """Those of one of the sets that are stacked."""
        return Moments(*(field[number] for field in self))

    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction, what an EMA averages; zero for fewer than two."""
        others = (self.count - 1).clamp(min=1).to(self.var.dtype).unsqueeze(-1)
        return torch.addcdiv(self.var, self.var, others)


class Parts(NamedTuple):
    """Moments of several tensors, before they are merged.

    Attributes:
        moments: of parts of this rank's tensors, stacked.
        firsts: the first part of each tensor.
        gathered: what all ranks of a group have, shape (number of ranks, number of tensors, *).
    """

    moments: Moments
    firsts: tuple[int, ...]
    gathered: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, xs: Sequence[Tensor], grid: Grid | None = None) -> Parts:
        """Of tensors of shape (N, C, *), with as many channels; see :meth:`Moments.of`.

        Args:
            grid: theirs, by :func:`bn_det.layers.kernels.grid_of`; None has ATen compute them.
        """
        for x in xs:
            if x.dim() < 2 or not x.is_floating_point():
                raise ValueError(
                    "moments need a floating point tensor of shape (N, C, *), got "
                    f"{x.dtype} of shape {tuple(x.shape)}"
                )
        stack, firsts = kernels.moments(xs, grid)
        return cls(Moments(*stack), firsts)

    @classmethod
    def of_rows(cls, rows: Sequence[Moments]) -> Parts:
        """Of tensors whose moments are known."""
        return cls(Moments.stack(rows), tuple(range(len(rows))))

    def all_gather(self, group: dist.ProcessGroup, meeting: Meeting) -> Parts:
        """Those of all ranks of a group, in one collective.

        There are as many tensors on every rank, with the same number of channels; any may be empty.
        What merges from them is the same on every rank, to the bit.

        Args:
            meeting: that of the ranks.
        """
        packed = kernels.pack(self.moments, self.firsts)
        gathered = packed.new_empty(dist.get_world_size(group), *packed.shape)
        whole, own = gathered.view(-1), packed.view(-1)
        meeting.exchange(partial(gather_into, whole, own))
        return self._replace(gathered=gathered)

    def merge(self, sets: Sequence[Sequence[int]]) -> Moments:
        """The moments of sets of the tensors, stacked.

        Args:
            sets: the tensors' numbers.
        """
        if self.gathered is None:
            return Moments(*kernels.merge(self.moments, self.firsts, sets))
        return Moments(*kernels.merge_packed(self.gathered, sets, self.moments.mean.dtype))

    def sizes(self, here: Sequence[int]) -> list[int]:
        """Values per channel of each tensor, of which only 0, 1 and more are told apart.

        Args:
            here: of those on this rank. Where it is more than one there is no need to wait for the
                device.
        """
        if self.gathered is None:
            return list(here)
        return [n if n > 1 else int(self.gathered[:, k, 0].sum()) for k, n in enumerate(here)]
