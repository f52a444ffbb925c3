"""Launches of Triton's kernels over lists of pieces on a GPU, for :mod:`bn_det.layers.kernels`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels
from .pieces import Normalization, Stack
from .types import NormWithStatistics


class Grid(NamedTuple):
    """How programs share the pieces of a list.

    A tile has ``width`` places by ``channels`` channels. Places are those of one sample, or with
    channels_last of all.

    Attributes:
        firsts: the first row of programs of each piece.
        pieces: these rows, and the samples and places of each piece (1 sample with channels_last),
            as kernels take them: see :func:`_coded`.
        tiles: that each program goes through.
        size: numbers of rows and of blocks of channels.
        num_channels: C.
        channels_last: whether the first piece that is either is, and so all will be.
    """

    firsts: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    tiles: int
    width: int
    channels: int
    size: tuple[int, int, int]
    num_channels: int
    channels_last: bool

    @property
    def constants(self) -> tuple[bool, int, int]:
        """What kernels are compiled for."""
        return self.channels_last, self.width, self.channels

    def pieces_of(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The pieces in the memory format that they have in common here."""
        return tuple([x.contiguous(memory_format=self.memory_format) for x in xs])

    def as_given(
        self, given: Sequence[Tensor], xs: Sequence[Tensor], ys: Sequence[Tensor]
    ) -> list[Tensor]:
        """What has been made of pieces, in the memory format that each of these was given in."""
        return [
            y
            if x is piece
            else y.contiguous(memory_format=_memory_format(piece) or self.memory_format)
            for piece, x, y in zip(given, xs, ys, strict=True)
        ]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


_PROGRAMS = 2112
"""To aim at: 16 for each multiprocessor of an H100."""

_TILE = 1024
"""Values that a program has at once."""

_BLOCK = 32
"""Rows, and channels, that are merged at once."""

_CHANNELS = 128
"""That an EMA moves at once."""


def grid_of(xs: Sequence[Tensor]) -> Grid:
    """How programs share the pieces; in the memory format of the first that has one alone."""
    formats = (_memory_format(x) for x in xs)
    channels_last = next(filter(None, formats), None) is torch.channels_last
    return _grid(tuple([x.shape for x in xs]), channels_last)


def _memory_format(x: Tensor) -> torch.memory_format | None:
    """That of a tensor; None where it has both, or neither."""
    is_contiguous = x.is_contiguous()
    if x.dim() != 4:
        return torch.contiguous_format if is_contiguous else None
    if is_contiguous == x.is_contiguous(memory_format=torch.channels_last):
        return None
    return torch.contiguous_format if is_contiguous else torch.channels_last


@lru_cache(maxsize=4096)
def _grid(shapes: tuple[tuple[int, ...], ...], channels_last: bool) -> Grid:
    num_channels = shapes[0][1]
    channels = min(64, triton.next_power_of_2(num_channels)) if channels_last else 1
    width = _TILE // channels
    blocks = -(-num_channels // channels)
    samples, places = [], []
    for shape in shapes:
        num_places = math.prod(shape[2:])
        samples.append(1 if channels_last else shape[0])
        places.append(num_places * shape[0] if channels_last else num_places)
    tiles = [n * -(-m // width) for n, m in zip(samples, places, strict=True)]
    each = max(4, -(-sum(tiles) * blocks // _PROGRAMS))
    firsts, row = [], 0
    for number in tiles:
        firsts.append(row)
        row += max(1, -(-number // each))
    pieces = _coded(firsts), _coded(samples), _coded(places)
    size = row, blocks, 1
    layout = num_channels, channels_last
    return Grid(tuple(firsts), pieces, each, width, channels, size, *layout)


def _coded(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes that Triton does not compile anew for: in a tuple it does for 1 and multiples of 16."""
    return tuple([2 * size + 3 for size in sizes])


_compiled: dict[tuple, Any] = {}


def _launch(
    kernel: Any, grid: tuple[int, int, int], pointers: Sequence[Tensor], *args: Any, kind: tuple
) -> None:
    """Launch a kernel.

    Triton takes most of the time that a launch takes to find out what it has compiled already.

    Args:
        pointers: tensors of others, which may not be aligned.
        args: all that the kernel takes.
        kind: what decides, with the alignment, which of its variants is the right one.
    """
    device = pointers[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, pointers, *args, kind=kind)
        return
    for tensor in pointers:
        if tensor.data_ptr() % 16:
            kernel[grid](*args)
            return
    key = id(kernel), device.index, kind
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args)  # None from the interpreter
    else:
        compiled[grid](*args)


def moments(xs: Sequence[Tensor], grid: Grid) -> Stack:
    """Of each part of each piece; the first part of each is in ``grid.firsts``."""
    xs = grid.pieces_of(xs)
    num_rows, num_channels, like = grid.size[0], grid.num_channels, xs[0]
    # Not by torch.promote_types, which is a call of ATen.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    mean, var = like.new_empty((2, num_rows, num_channels), dtype=dtype)
    count = like.new_empty(num_rows, dtype=torch.float64)
    _launch(
        triton_kernels.moments,
        grid.size,
        xs,
        xs,
        *grid.pieces,
        count,
        mean,
        var,
        num_channels,
        grid.tiles,
        *grid.constants,
        kind=(like.dtype, num_channels, len(xs), *grid.constants),
    )
    return count, mean, var


def merge(stack: Stack, firsts: tuple[int, ...], sets: Sequence[Sequence[int]]) -> Stack:
    """Moments of sets of pieces, from those of their parts."""
    merged = _empty_stack(len(sets), stack[1])
    _merge_into(merged, stack, sets, firsts)
    return merged


def pack(stack: Stack, firsts: tuple[int, ...]) -> Tensor:
    """Moments of each piece, in one float64 tensor of shape (number of pieces, 1 + 2 C)."""
    num_pieces, num_channels = len(firsts), stack[1].shape[1]
    packed = stack[0].new_empty((num_pieces, 1 + 2 * num_channels))
    _merge_into(_unpacked(packed), stack, [[k] for k in range(num_pieces)], firsts)
    return packed


def merge_packed(gathered: Tensor, sets: Sequence[Sequence[int]], dtype: torch.dtype) -> Stack:
    """Moments of sets of pieces over ranks; gathered has shape (ranks, pieces, 1 + 2 C)."""
    parts = _unpacked(gathered.flatten(0, 1))
    merged = _empty_stack(len(sets), parts[1], dtype)
    _merge_into(merged, parts, sets, (0,), gathered.shape[1])
    return merged


def _empty_stack(size: int, like: Tensor, dtype: torch.dtype | None = None) -> Stack:
    mean, var = like.new_empty((2, size, like.shape[1]), dtype=dtype)
    return like.new_empty(size, dtype=torch.float64), mean, var


def _unpacked(packed: Tensor) -> Stack:
    num_channels = packed.shape[1] // 2
    count, mean, var = packed.split([1, num_channels, num_channels], 1)
    return count[:, 0], mean, var


def _merge_into(
    merged: Stack,
    parts: Stack,
    sets: Sequence[Sequence[int]],
    firsts: tuple[int, ...],
    num_pieces: int = 0,
) -> None:
    """Merge parts into sets of pieces.

    Args:
        merged: is written to.
        firsts: the first part of each piece.
        num_pieces: where a part of each piece follow each other in turn, their number.
    """
    num_parts, num_channels = parts[1].shape
    constants = num_pieces, _BLOCK
    strides = [field.stride(0) for field in (*parts, *merged)]
    _launch(
        triton_kernels.merge,
        (-(-num_channels // _BLOCK), len(sets), 1),
        (parts[0],),
        *parts,
        *merged,
        _coded(firsts),
        _masks(sets),
        *strides,
        num_channels,
        num_parts,
        *constants,
        kind=(parts[1].dtype, merged[1].dtype, *strides, len(firsts), len(sets), *constants),
    )


def normalize(xs: Sequence[Tensor], how: Normalization, grid: Grid) -> list[Tensor]:
    """See :func:`bn_det.layers.kernels.normalize`."""
    given, xs = xs, grid.pieces_of(xs)
    ys = [torch.empty_like(x) for x in xs]
    of = _Arguments.of(xs, how, grid)
    _launch(
        triton_kernels.normalize,
        grid.size,
        (*xs, *of.weights, *of.biases),
        xs,
        tuple(ys),
        *of.pieces,
        *how.batches[1:],
        of.weights,
        of.biases,
        *of.numbers,
        kind=of.kind,
    )
    return grid.as_given(given, xs, ys)


def backward_sums(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization, grid: Grid
) -> tuple[Tensor, Tensor]:
    """See :func:`bn_det.layers.kernels.backward_sums`."""
    xs, dys = grid.pieces_of(xs), grid.pieces_of(dys)
    num_channels = grid.num_channels
    _, mean, var = how.batches
    rows = mean.new_empty((grid.size[0], 2, num_channels))
    of = _Arguments.of(xs, how, grid)
    _launch(
        triton_kernels.sums,
        grid.size,
        (*dys, *xs, *of.weights, *of.biases),
        dys,
        xs,
        *of.pieces,
        mean,
        var,
        of.weights,
        of.biases,
        rows,
        *of.numbers,
        kind=of.kind,
    )
    num_batches = len(mean)
    totals = mean.new_empty((num_batches + len(how.weights), 2, num_channels))
    firsts, _, _, batch_of, affine_of = of.pieces
    constants = how.weights[0] is not None, _BLOCK
    _launch(
        triton_kernels.add_up,
        (-(-num_channels // _BLOCK), len(totals), 1),
        of.weights,
        rows,
        firsts,
        batch_of,
        affine_of,
        of.weights,
        totals,
        num_channels,
        len(rows),
        num_batches,
        *constants,
        kind=(mean.dtype, num_channels, len(xs), len(of.weights), *constants),
    )
    return totals[:num_batches], totals[num_batches:]


def backward_inputs(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization, sums: Tensor, grid: Grid
) -> list[Tensor]:
    """See :func:`bn_det.layers.kernels.backward_inputs`."""
    given, xs, dys = xs, grid.pieces_of(xs), grid.pieces_of(dys)
    dxs = [torch.empty_like(x) for x in xs]
    of = _Arguments.of(xs, how, grid)
    _launch(
        triton_kernels.inputs,
        grid.size,
        (*dys, *xs, *of.weights, *of.biases),
        dys,
        xs,
        tuple(dxs),
        *of.pieces,
        *how.batches,
        sums,
        of.weights,
        of.biases,
        *of.numbers,
        kind=of.kind,
    )
    return grid.as_given(given, xs, dxs)


class _Arguments(NamedTuple):
    """What the kernels that go through pieces with a batch and an affine each have in common.

    Attributes:
        weights, biases: of the affines; one tensor that is not read where there are none.
        pieces: those of the grid, and the batch and the affine of each piece.
        numbers: how many channels and tiles there are, and what the kernels are compiled for.
        kind: as :func:`_launch` takes it.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    pieces: tuple[tuple[int, ...], ...]
    numbers: tuple[Any, ...]
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, xs: Sequence[Tensor], how: Normalization, grid: Grid) -> _Arguments:
        nothing = (how.batches[1],)
        has = how.weights[0] is not None, how.biases[0] is not None
        weights = tuple([w.contiguous() for w in how.weights if w is not None]) or nothing
        biases = tuple([b.contiguous() for b in how.biases if b is not None]) or nothing
        pieces = *grid.pieces, _coded(how.batch_of), _coded(how.affine_of)
        constants = how.eps, *has, how.relu, *grid.constants
        numbers = grid.num_channels, grid.tiles, *constants
        kind = xs[0].dtype, grid.num_channels, len(xs), len(weights), *constants
        return cls(weights, biases, pieces, numbers, kind)


def update_emas(
    batches: Stack, sets: Sequence[Sequence[int]], layers: Sequence[NormWithStatistics]
) -> None:
    """Move the EMAs of layers towards the statistics of sets of batches, in this order."""
    holders = list(dict.fromkeys(layers))
    count, mean, var = batches
    num_channels = mean.shape[1]
    means = tuple([layer.running_mean for layer in holders])
    variances = tuple([layer.running_var for layer in holders])
    _launch(
        triton_kernels.update_emas,
        (len(holders), 1, 1),
        (*means, *variances),
        count,
        mean,
        var,
        means,
        variances,
        tuple([layer.num_batches_tracked for layer in holders]),
        tuple([_bits(layer.momentum) for layer in holders]),
        _masks(sets),
        _coded([holders.index(layer) for layer in layers]),
        num_channels,
        len(mean),
        _CHANNELS,
        kind=(mean.dtype, means[0].dtype, num_channels, len(holders), len(sets)),
    )


def _masks(sets: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Sets of numbers as bits, as kernels take them."""
    return _coded([sum([1 << number for number in numbers]) for numbers in sets])


_LEAST = 1e-300


def _bits(momentum: float | None) -> int:
    """Those of a float64, as Triton would take a float in float32; odd, as in :func:`_coded`."""
    momentum = math.nan if momentum is None else max(float(momentum), _LEAST)
    return 1 | struct.unpack("q", struct.pack("d", momentum))[0]


def check(device: torch.device) -> None:
    """Raise what comes of it unless the kernels work on a device."""
    ones = [torch.ones(2, 2, 2, 2, device=device)]
    _, mean, _ = moments(ones, grid_of(ones))
    if mean.tolist() != [[1.0, 1.0]]:
        raise RuntimeError(f"the mean of ones is {mean.tolist()}")
