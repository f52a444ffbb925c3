"""The kernels of batch normalization, each over a list of pieces, in Triton or by ATen.

All that is computed value by value is behind this, and what pieces have in common is merged on
numbers per channel. A piece is a tensor of shape (N, C, *), in any memory format, and may be
empty. ATen's kernels run everywhere; Triton's take a list in one launch, and are for GPUs. Whose a
list's are is found out once, by :func:`grid_of`, and goes with the list from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import choose
from . import aten_kernels
from .held import constant, with_zero_gradients
from .pieces import Normalization, Stack

if TYPE_CHECKING:
    from .triton_lists import Grid

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("aten", "triton")
_MOST = 16
"""Pieces, sets and batches that one launch of Triton's takes."""

_TOO_LARGE = 2**30
"""For numbers of 32 bits; a launch does not count there."""

_PLAIN = {Tensor, nn.Parameter}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_wanted: str | None = None


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Have the kernels be those of ATen, or Triton's wherever they can be, in the block.

    Triton's take tensors of the CPU where ``TRITON_INTERPRET=1`` was set before its import.
    """
    global _wanted
    choose("implementation", name, IMPLEMENTATIONS)
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before


def one_launch(xs: Sequence[Tensor], number: int = 0) -> ModuleType | None:
    """Triton's kernels, if they take this list; else None.

    Args:
        number: of sets, batches or affines, if there are more of them than tensors.
    """
    first = xs[0]
    if _wanted is None and first.device.type != "cuda":
        return None
    if _wanted == "aten" or max(len(xs), number) > _MOST or torch.compiler.is_compiling():
        return None
    dtype, device = first.dtype, first.device
    for x in xs:  # which have to be tensors, and not what stands for them
        if type(x) not in _PLAIN or x.dtype != dtype or x.device != device:
            return None
        if x.numel() >= _TOO_LARGE:
            return None
    if dtype not in _DTYPES:
        return None
    return _triton() if _wanted == "triton" else _working(device)


@cache
def _triton() -> ModuleType:
    from . import triton_lists

    return triton_lists


@cache
def _working(device: torch.device) -> ModuleType | None:
    """Triton's kernels, if they work on a device; it is told once if not."""
    try:
        kernels = _triton()
        kernels.check(device)
    except Exception as e:  # whatever is missing: Triton, a compiler, a device that it knows
        logger.warning(
            "BatchNorm over lists of tensors is slower than it could be on %s, as Triton's kernels "
            "do not work there (%s: %s)",
            device,
            type(e).__name__,
            str(e).strip().partition("\n")[0],
        )
        return None
    return kernels


def grid_of(xs: Sequence[Tensor]) -> Grid | None:
    """How Triton's kernels go through a list of pieces; None where ATen's compute it."""
    triton = one_launch(xs)
    return triton.grid_of(xs) if triton is not None and xs[0].shape[1] else None


def moments(xs: Sequence[Tensor], grid: Grid | None = None) -> tuple[Stack, tuple[int, ...]]:
    """Of parts of the pieces, in float32 at least; and the number of each piece's first part.

    An empty piece has one part, of zeros.
    """
    if grid is not None:
        return _triton().moments(xs, grid), grid.firsts
    return aten_kernels.moments(xs), tuple(range(len(xs)))


def merge(stack: Stack, firsts: tuple[int, ...], sets: Sequence[Sequence[int]]) -> Stack:
    """Moments of sets of pieces from those of their parts.

    Args:
        firsts: the first part of each piece, as from :func:`moments`.
        sets: numbers of pieces.
    """
    num_parts = len(stack[0])
    triton = one_launch(stack[1:], max(len(firsts), len(sets)))
    if triton is not None and (num_parts > len(firsts) or any(len(s) > 1 for s in sets)):
        return triton.merge(stack, firsts, sets)
    ends = (*firsts[1:], num_parts)
    parts = [range(first, end) for first, end in zip(firsts, ends, strict=True)]
    return aten_kernels.merge(stack, [[row for k in of for row in parts[k]] for of in sets])


def pack(stack: Stack, firsts: tuple[int, ...]) -> Tensor:
    """Moments of each piece, as one float64 tensor of shape (number of pieces, 1 + 2 C)."""
    triton = one_launch(stack[1:], len(firsts))
    if triton is not None:
        return triton.pack(stack, firsts)
    count, mean, var = merge(stack, firsts, [[k] for k in range(len(firsts))])
    return torch.cat([count.unsqueeze(1), mean.double(), var.double()], 1)


def merge_packed(gathered: Tensor, sets: Sequence[Sequence[int]], dtype: torch.dtype) -> Stack:
    """Moments of sets of pieces, over ranks.

    Args:
        gathered: what each rank has packed, shape (number of ranks, number of pieces, 1 + 2 C).
        dtype: of means and variances.
    """
    num_pieces, size = gathered.shape[1:]
    triton = one_launch([gathered], max(num_pieces, len(sets)))
    if triton is not None:
        return triton.merge_packed(gathered, sets, dtype)
    counts, means, variances = gathered.split([1, size // 2, size // 2], 2)
    count, mean, var = aten_kernels.merged_rows(counts.squeeze(2), means, variances)
    return aten_kernels.merge((count, mean.to(dtype), var.to(dtype)), sets)


def normalize(xs: Sequence[Tensor], how: Normalization, grid: Grid | None = None) -> list[Tensor]:
    """Each piece by the statistics of its batch, with its affine, and through the ReLU if any."""
    if grid is not None:
        return _triton().normalize(xs, how, grid)
    return aten_kernels.normalize(xs, how)


def normalize_one(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The same of one piece, by constant statistics; differentiable in x, weight and bias.

    Args:
        mean, var: may be None for an empty piece.
    """
    y = aten_kernels.normalize_one(x, mean, var, constant(weight), constant(bias), eps)
    return with_zero_gradients(y, weight, bias)


def backward_sums(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization, grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Per channel the sum of dy, and the sum of dy times the normalized x.

    With a ReLU, dy is what comes through it.

    Returns:
        of each batch, times the weights of its pieces, shape (number of batches, 2, C); and of
        each affine, shape (number of affines, 2, C).
    """
    if grid is not None:
        return _triton().backward_sums(dys, xs, how, grid)
    return aten_kernels.backward_sums(dys, xs, how)


def backward_inputs(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    how: Normalization,
    sums: Tensor,
    grid: Grid | None = None,
) -> list[Tensor]:
    """dx of each piece: (dy weight - (sum_0 + z sum_1) / count) / sqrt(var + eps).

    z is the normalized x (Ioffe & Szegedy, *Batch Normalization*, 2015, Sec. 3).

    Args:
        sums: of each batch, as from :func:`backward_sums`, on all ranks.
    """
    if grid is not None:
        return _triton().backward_inputs(dys, xs, how, sums, grid)
    return aten_kernels.backward_inputs(dys, xs, how, sums)
