"""The kernels of :mod:`bn_det.layers.kernels` in Triton, for pieces on a GPU: one launch a list.

On a GPU the small levels of a pyramid cost what their launches cost. So a kernel gets the whole
list, and each of its programs finds the piece that its part of the work is in. What the programs
find of a piece merges as pieces do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .aten_kernels import Stack


class _Grid(NamedTuple):
    """How programs share the pieces.

    A tile has ``width`` places by ``channels`` channels. Places are those of one sample, or with
    channels_last of all.

    Attributes:
        firsts: the first row of programs of each piece.
        pieces: these rows, and the samples and places of each piece (1 sample with channels_last),
            as kernels take them: see :func:`_coded`.
        tiles: that each program goes through.
        size: numbers of rows and of blocks of channels.
    """

    firsts: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    tiles: int
    width: int
    channels: int
    size: tuple[int, int, int]


_PROGRAMS = 2112
"""To aim at: 16 for each multiprocessor of an H100."""

_TILE = 1024
"""Values that a program has at once."""

_BLOCK = 32
"""Rows, and channels, that are merged at once."""

_CHANNELS = 128
"""That an EMA moves at once."""


@lru_cache(maxsize=4096)
def _grid(shapes: tuple[tuple[int, ...], ...], channels_last: bool) -> _Grid:
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
    return _Grid(tuple(firsts), pieces, each, width, channels, (row, blocks, 1))


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


def moments(xs: Sequence[Tensor]) -> tuple[Stack, tuple[int, ...]]:
    """Of each part of each piece; and the number of the first part of each piece."""
    xs, channels_last = _alike(xs)
    grid, num_channels = _grid(tuple([x.shape for x in xs]), channels_last), xs[0].shape[1]
    num_rows, like = grid.size[0], xs[0]
    # Not by torch.promote_types, which is a call of ATen.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    mean, var = like.new_empty((2, num_rows, num_channels), dtype=dtype)
    count = like.new_empty(num_rows, dtype=torch.float64)
    constants = channels_last, grid.width, grid.channels
    _launch(
        _moments,
        grid.size,
        xs,
        xs,
        *grid.pieces,
        count,
        mean,
        var,
        num_channels,
        grid.tiles,
        *constants,
        kind=(like.dtype, num_channels, len(xs), *constants),
    )
    return (count, mean, var), grid.firsts


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
        _merge,
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


def normalize(
    xs: Sequence[Tensor],
    batches: Stack,
    batch_of: tuple[int, ...],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    affine_of: tuple[int, ...],
    eps: float,
) -> list[Tensor]:
    """Each piece by the statistics of its batch, with its affine."""
    xs, channels_last = _alike(xs)
    grid, num_channels = _grid(tuple([x.shape for x in xs]), channels_last), xs[0].shape[1]
    ys = [torch.empty_like(x) for x in xs]
    _, mean, var = batches
    constants = weights[0] is not None, biases[0] is not None
    constants = (eps, *constants, channels_last, grid.width, grid.channels)
    weights, biases = _pointers(weights, mean), _pointers(biases, mean)
    _launch(
        _normalize,
        grid.size,
        (*xs, *weights, *biases),
        xs,
        tuple(ys),
        *grid.pieces,
        _coded(batch_of),
        _coded(affine_of),
        mean,
        var,
        weights,
        biases,
        num_channels,
        grid.tiles,
        *constants,
        kind=(xs[0].dtype, num_channels, len(xs), len(weights), *constants),
    )
    return ys


def backward_sums(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    batches: Stack,
    batch_of: tuple[int, ...],
    weights: Sequence[Tensor | None],
    affine_of: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Of dy, and of dy times the normalized x: of batches, times the weights, and of affines.

    Returns:
        shapes (number of batches, 2, C) and (number of affines, 2, C).
    """
    xs, channels_last = _alike(xs)
    dys, _ = _alike(dys, channels_last)
    grid, num_channels = _grid(tuple([x.shape for x in xs]), channels_last), xs[0].shape[1]
    _, mean, var = batches
    rows = mean.new_empty((grid.size[0], 2, num_channels))
    constants = eps, channels_last, grid.width, grid.channels
    _launch(
        _sums,
        grid.size,
        (*dys, *xs),
        dys,
        xs,
        *grid.pieces,
        _coded(batch_of),
        mean,
        var,
        rows,
        num_channels,
        grid.tiles,
        *constants,
        kind=(xs[0].dtype, num_channels, len(xs), *constants),
    )
    num_batches = len(mean)
    totals = mean.new_empty((num_batches + len(weights), 2, num_channels))
    constants = weights[0] is not None, _BLOCK
    weights = _pointers(weights, mean)
    _launch(
        _add_up,
        (-(-num_channels // _BLOCK), len(totals), 1),
        weights,
        rows,
        grid.pieces[0],
        _coded(batch_of),
        _coded(affine_of),
        weights,
        totals,
        num_channels,
        len(rows),
        num_batches,
        *constants,
        kind=(mean.dtype, num_channels, len(xs), len(weights), *constants),
    )
    return totals[:num_batches], totals[num_batches:]


def backward_inputs(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    batches: Stack,
    batch_of: tuple[int, ...],
    weights: Sequence[Tensor | None],
    affine_of: tuple[int, ...],
    sums: Tensor,
    eps: float,
) -> list[Tensor]:
    """dx of each piece, by the sums of its batch."""
    xs, channels_last = _alike(xs)
    dys, _ = _alike(dys, channels_last)
    grid, num_channels = _grid(tuple([x.shape for x in xs]), channels_last), xs[0].shape[1]
    dxs = [torch.empty_like(x) for x in xs]
    count, mean, var = batches
    constants = eps, weights[0] is not None, channels_last, grid.width, grid.channels
    weights = _pointers(weights, mean)
    _launch(
        _inputs,
        grid.size,
        (*dys, *xs, *weights),
        dys,
        xs,
        tuple(dxs),
        *grid.pieces,
        _coded(batch_of),
        _coded(affine_of),
        count,
        mean,
        var,
        sums,
        weights,
        num_channels,
        grid.tiles,
        *constants,
        kind=(xs[0].dtype, num_channels, len(xs), len(weights), *constants),
    )
    return dxs


def update_emas(
    batches: Stack, sets: Sequence[Sequence[int]], layers: Sequence[_BatchNorm]
) -> None:
    """Move the EMAs of layers towards the statistics of sets of batches, in this order."""
    holders = list(dict.fromkeys(layers))
    count, mean, var = batches
    num_channels = mean.shape[1]
    means = tuple([layer.running_mean for layer in holders])
    variances = tuple([layer.running_var for layer in holders])
    _launch(
        _update_emas,
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


def _alike(
    xs: Sequence[Tensor], channels_last: bool | None = None
) -> tuple[tuple[Tensor, ...], bool]:
    """The pieces in one memory format, that of the first, and whether it is channels_last."""
    if channels_last is None:
        first = xs[0]
        channels_last = (
            first.dim() == 4
            and not first.is_contiguous()
            and first.is_contiguous(memory_format=torch.channels_last)
        )
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    return tuple([x.contiguous(memory_format=wanted) for x in xs]), channels_last


def _pointers(tensors: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """Of the tensors, or one that will not be read."""
    return (other,) if tensors[0] is None else tuple(tensors)


# How large the pieces are is no reason to compile anew.
_jit = triton.jit(do_not_specialize=["tiles", "num_rows", "num_batches"])


@triton.jit
def _size(coded):
    return (coded - 3) >> 1


@triton.jit
def _of_piece(row, firsts, values):
    value = values[0]
    for k in tl.static_range(1, len(values)):
        if row >= _size(firsts[k]):
            value = values[k]
    return value


@triton.jit
def _tiles_of(row, firsts, samples, places, tiles, WIDTH: tl.constexpr):
    """The places of the row's piece, and the first and the last of the tiles that it is for."""
    here = _size(_of_piece(row, firsts, places))
    total = _size(_of_piece(row, firsts, samples)) * tl.cdiv(here, WIDTH)
    begin = (row - _size(_of_piece(row, firsts, firsts))) * tiles
    return here, begin, tl.minimum(begin + tiles, total)


@triton.jit
def _number(values, index):
    value = values[0]
    for k in tl.static_range(1, len(values)):
        if index == k:
            value = values[k]
    return value


@triton.jit
def _tile(
    j, places, num_channels, c, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile of a piece, and how many places are in it."""
    per_sample = tl.maximum(tl.cdiv(places, WIDTH), 1)  # of an empty piece
    sample = (j // per_sample).to(tl.int64)
    start = (j % per_sample) * WIDTH
    if ALIGNED:
        places = places // 16 * 16  # what it is, as the compiler can see
    place = start + tl.arange(0, WIDTH)
    if CHANNELS_LAST:
        place = place[:, None]
        offsets = place.to(tl.int64) * num_channels + c[None, :]
        mask = (place < places) & (c < num_channels)[None, :]
    else:
        base = (sample * num_channels + c) * places
        offsets = base[:, None] + place[None, :]
        mask = (place < places)[None, :] & (c < num_channels)[:, None]
    return offsets, mask, tl.minimum(places - start, WIDTH)


@triton.jit
def _spread(values, CHANNELS_LAST: tl.constexpr):
    """Numbers per channel, as they meet a tile."""
    if CHANNELS_LAST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def _total(values, CHANNELS_LAST: tl.constexpr):
    """The sum of a tile per channel."""
    return tl.sum(values, 0 if CHANNELS_LAST else 1)


@triton.jit
def _shifted_sums(
    x, begin, end, places, num_channels, c, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of what is left of x, and of its square, without the mean of the first tile."""
    offsets, mask, number = _tile(begin, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
    first = tl.load(x + offsets, mask=mask & (begin < end), other=0.0).to(dtype)
    shift = _total(first, CHANNELS_LAST) / number
    sums = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    count = 0
    for j in range(begin, end):
        offsets, mask, number = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(dtype)
        value = tl.where(mask, value - _spread(shift, CHANNELS_LAST), 0.0)
        sums += value
        squares += value * value
        count += number
    return shift, _total(sums, CHANNELS_LAST), _total(squares, CHANNELS_LAST), count


@_jit
def _moments(
    xs, firsts, samples, places, counts, means, variances, num_channels, tiles,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x = _of_piece(row, firsts, xs)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    dtype: tl.constexpr = means.dtype.element_ty
    if here % 16 == 0:
        shift, sums, squares, count = _shifted_sums(
            x, begin, end, here, num_channels, c, dtype, CHANNELS_LAST, WIDTH, True
        )
    else:
        shift, sums, squares, count = _shifted_sums(
            x, begin, end, here, num_channels, c, dtype, CHANNELS_LAST, WIDTH, False
        )
    present = tl.maximum(count, 1).to(dtype)
    off = sums / present
    var = squares / present - off * off
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    mean = tl.where(count > 0, shift + off, 0.0)
    at = row.to(tl.int64) * num_channels + c
    tl.store(means + at, mean, mask=c < num_channels)
    tl.store(variances + at, var, mask=c < num_channels)
    tl.store(counts + row, count.to(tl.float64))


@triton.jit
def _are_in(row, firsts, mask, PIECES: tl.constexpr):
    """Whether rows are of pieces that are in a set."""
    if PIECES > 0:
        piece = row % PIECES
    else:
        piece = tl.zeros_like(row)
        for k in tl.static_range(1, len(firsts)):
            piece = tl.where(row >= _size(firsts[k]), k, piece)
    return ((mask >> piece) & 1) == 1


@_jit
def _merge(
    counts, means, variances, to_count, to_mean, to_var, firsts, masks, count_stride, mean_stride,
    var_stride, to_count_stride, to_mean_stride, to_var_stride, num_channels, num_rows,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan, Golub & LeVeque, 1979, in float64, as there is little of it."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(1)
    mask = _size(_number(masks, number))
    valid = (c < num_channels)[None, :]
    total = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK, BLOCK), tl.float64)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        here = (row < num_rows) & _are_in(row, firsts, mask, PIECES)
        row = row.to(tl.int64)
        n = tl.load(counts + row * count_stride, mask=here, other=0.0).to(tl.float64)
        at = means + row[:, None] * mean_stride + c[None, :]
        # What is empty weighs nothing, whatever it holds.
        mean = tl.load(at, mask=valid & (n > 0)[:, None], other=0.0).to(tl.float64)
        total += n
        sums += n[:, None] * mean
    count = tl.sum(total, 0)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    sums = tl.zeros((BLOCK, BLOCK), tl.float64)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        here = (row < num_rows) & _are_in(row, firsts, mask, PIECES)
        row = row.to(tl.int64)
        n = tl.load(counts + row * count_stride, mask=here, other=0.0).to(tl.float64)
        present = valid & (n > 0)[:, None]
        at = means + row[:, None] * mean_stride + c[None, :]
        off = tl.load(at, mask=present, other=0.0).to(tl.float64) - mean[None, :]
        at = variances + row[:, None] * var_stride + c[None, :]
        var = tl.load(at, mask=present, other=0.0).to(tl.float64)
        sums += tl.where(present, n[:, None] * (var + off * off), 0.0)
    var = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    tl.store(to_count + number * to_count_stride, count)
    tl.store(to_mean + number * to_mean_stride + c, mean, mask=c < num_channels)
    tl.store(to_var + number * to_var_stride + c, var, mask=c < num_channels)


@triton.jit
def _statistics(means, variances, batch, num_channels, c, EPS: tl.constexpr):
    """Mean and the inverse of the standard deviation of a batch."""
    mean = tl.load(means + batch * num_channels + c, mask=c < num_channels, other=0.0)
    var = tl.load(variances + batch * num_channels + c, mask=c < num_channels, other=1.0)
    return mean, 1.0 / tl.sqrt(var + EPS)


@triton.jit
def _scaled(
    x, y, begin, end, places, num_channels, c, mean, scale, bias, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    mean = _spread(mean, CHANNELS_LAST)
    scale = _spread(scale, CHANNELS_LAST)
    bias = _spread(bias, CHANNELS_LAST)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = (value - mean) * scale + bias
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@_jit
def _normalize(
    xs, ys, firsts, samples, places, batch_of, affine_of, means, variances, weights, biases,
    num_channels, tiles, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x = _of_piece(row, firsts, xs)
    y = _of_piece(row, firsts, ys)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    batch = _size(_of_piece(row, firsts, batch_of))
    affine = _size(_of_piece(row, firsts, affine_of))
    mean, scale = _statistics(means, variances, batch, num_channels, c, EPS)
    bias = tl.zeros_like(mean)
    if HAS_WEIGHT:
        scale *= tl.load(_number(weights, affine) + c, mask=c < num_channels, other=0.0)
    if HAS_BIAS:
        bias += tl.load(_number(biases, affine) + c, mask=c < num_channels, other=0.0)
    if here % 16 == 0:
        _scaled(
            x, y, begin, end, here, num_channels, c, mean, scale, bias, CHANNELS_LAST, WIDTH, True
        )
    else:
        _scaled(
            x, y, begin, end, here, num_channels, c, mean, scale, bias, CHANNELS_LAST, WIDTH, False
        )


@triton.jit
def _sums_of(
    dy, x, begin, end, places, num_channels, c, mean, inv_std, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    wide = _spread(mean, CHANNELS_LAST)
    shape: tl.constexpr = (WIDTH, CHANNELS) if CHANNELS_LAST else (CHANNELS, WIDTH)
    plain = tl.zeros(shape, mean.dtype)
    products = tl.zeros(shape, mean.dtype)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        plain += grad
        products += tl.where(mask, grad * (value - wide), 0.0)
    return _total(plain, CHANNELS_LAST), _total(products, CHANNELS_LAST) * inv_std


@_jit
def _sums(
    dys, xs, firsts, samples, places, batch_of, means, variances, out,
    num_channels, tiles, EPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dy = _of_piece(row, firsts, dys)
    x = _of_piece(row, firsts, xs)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    batch = _size(_of_piece(row, firsts, batch_of))
    mean, inv_std = _statistics(means, variances, batch, num_channels, c, EPS)
    if here % 16 == 0:
        plain, products = _sums_of(
            dy, x, begin, end, here, num_channels, c, mean, inv_std, CHANNELS_LAST, WIDTH,
            CHANNELS, True,
        )  # fmt: skip
    else:
        plain, products = _sums_of(
            dy, x, begin, end, here, num_channels, c, mean, inv_std, CHANNELS_LAST, WIDTH,
            CHANNELS, False,
        )  # fmt: skip
    at = out + row.to(tl.int64) * 2 * num_channels + c
    tl.store(at, plain, mask=c < num_channels)
    tl.store(at + num_channels, products, mask=c < num_channels)


@_jit
def _add_up(
    rows, firsts, batch_of, affine_of, weights, totals, num_channels, num_rows, num_batches,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(1)
    dtype: tl.constexpr = totals.dtype.element_ty
    plain = tl.zeros((BLOCK,), dtype)
    products = tl.zeros((BLOCK,), dtype)
    for k in tl.static_range(len(batch_of)):
        affine = _size(affine_of[k])
        if (number == _size(batch_of[k])) | (number == num_batches + affine):
            first = _size(firsts[k])
            last = num_rows
            if k + 1 < len(batch_of):
                last = _size(firsts[k + 1])
            plain_here = tl.zeros((BLOCK, BLOCK), dtype)
            products_here = tl.zeros((BLOCK, BLOCK), dtype)
            for start in range(first, last, BLOCK):
                row = start + tl.arange(0, BLOCK)
                at = rows + row.to(tl.int64)[:, None] * 2 * num_channels + c[None, :]
                mask = (row < last)[:, None] & (c < num_channels)[None, :]
                plain_here += tl.load(at, mask=mask, other=0.0)
                products_here += tl.load(at + num_channels, mask=mask, other=0.0)
            scale = tl.full((BLOCK,), 1.0, dtype)
            if HAS_WEIGHT:  # noqa: SIM102, a constant of the compiler
                if number < num_batches:
                    scale = tl.load(_number(weights, affine) + c, mask=c < num_channels, other=0.0)
            plain += tl.sum(plain_here, 0) * scale
            products += tl.sum(products_here, 0) * scale
    at = totals + number * 2 * num_channels + c
    tl.store(at, plain, mask=c < num_channels)
    tl.store(at + num_channels, products, mask=c < num_channels)


@triton.jit
def _inputs_of(
    dy, x, dx, begin, end, places, num_channels, c, mean, scale, slope, offset,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    mean = _spread(mean, CHANNELS_LAST)
    scale = _spread(scale, CHANNELS_LAST)
    slope = _spread(slope, CHANNELS_LAST)
    offset = _spread(offset, CHANNELS_LAST)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = grad * scale - (offset + (value - mean) * slope)
        tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=mask)


@_jit
def _inputs(
    dys, xs, dxs, firsts, samples, places, batch_of, affine_of, counts, means, variances, totals,
    weights, num_channels, tiles, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(dy weight - (sum_0 + z sum_1) / count) / sqrt(var + eps), z being the normalized x."""
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dy = _of_piece(row, firsts, dys)
    x = _of_piece(row, firsts, xs)
    dx = _of_piece(row, firsts, dxs)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    batch = _size(_of_piece(row, firsts, batch_of))
    affine = _size(_of_piece(row, firsts, affine_of))
    mean, inv_std = _statistics(means, variances, batch, num_channels, c, EPS)
    count = tl.maximum(tl.load(counts + batch), 1.0).to(mean.dtype)
    at = totals + batch * 2 * num_channels + c
    offset = tl.load(at, mask=c < num_channels, other=0.0) / count * inv_std
    slope = tl.load(at + num_channels, mask=c < num_channels, other=0.0) / count
    slope *= inv_std * inv_std
    scale = inv_std
    if HAS_WEIGHT:
        scale *= tl.load(_number(weights, affine) + c, mask=c < num_channels, other=0.0)
    if here % 16 == 0:
        _inputs_of(
            dy, x, dx, begin, end, here, num_channels, c, mean, scale, slope, offset,
            CHANNELS_LAST, WIDTH, True,
        )  # fmt: skip
    else:
        _inputs_of(
            dy, x, dx, begin, end, here, num_channels, c, mean, scale, slope, offset,
            CHANNELS_LAST, WIDTH, False,
        )  # fmt: skip


@_jit
def _update_emas(
    counts, means, variances, running_means, running_vars, counters, momenta, masks,
    holder_of, num_channels, num_rows, CHANNELS: tl.constexpr,
):  # fmt: skip
    holder = tl.program_id(0)
    running_mean = _number(running_means, holder)
    running_var = _number(running_vars, holder)
    counter = _number(counters, holder)
    momentum = _number(momenta, holder).to(tl.int64).to(tl.float64, bitcast=True)
    for k in tl.static_range(len(masks)):
        mask = _size(masks[k])
        if holder == _size(holder_of[k]):
            total = tl.zeros((), tl.float64)
            for row in range(0, num_rows):
                if ((mask >> row) & 1) == 1:
                    total += tl.load(counts + row)
            if total > 0:
                seen = tl.load(counter) + 1
                weight = momentum
                if momentum != momentum:  # a cumulative average
                    weight = 1.0 / seen.to(tl.float64)
                for start in range(0, num_channels, CHANNELS):
                    c = start + tl.arange(0, CHANNELS)
                    valid = c < num_channels
                    mean = tl.zeros((CHANNELS,), tl.float64)
                    var = tl.zeros((CHANNELS,), tl.float64)
                    for row in range(0, num_rows):
                        count = tl.load(counts + row)
                        if (((mask >> row) & 1) == 1) & (count > 0):
                            of_row = tl.load(means + row * num_channels + c, mask=valid, other=0.0)
                            mean += count / total * of_row.to(tl.float64)
                            of_row = tl.load(
                                variances + row * num_channels + c, mask=valid, other=0.0
                            )
                            unbiased = count / tl.maximum(count - 1.0, 1.0)
                            var += count / total * unbiased * of_row.to(tl.float64)
                    _move(running_mean + c, mean, weight, valid)
                    _move(running_var + c, var, weight, valid)
                # The next batch of this population sees all that this one has moved.
                tl.debug_barrier()
                tl.store(counter, seen)
                tl.debug_barrier()


@triton.jit
def _move(at, towards, weight, mask):
    if weight > 2e-300:  # one of 0, which is the least that there is, keeps an infinity out
        old = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        new = (1 - weight) * old + weight * towards
        tl.store(at, new.to(at.dtype.element_ty), mask=mask)


def check(device: torch.device) -> None:
    """Raise what comes of it unless the kernels work on a device."""
    (_, mean, _), _ = moments([torch.ones(2, 2, 2, 2, device=device)])
    if mean.tolist() != [[1.0, 1.0]]:
        raise RuntimeError(f"the mean of ones is {mean.tolist()}")
