"""The kernels of :mod:`bn_det.layers.kernels` in Triton, which :mod:`triton_lists` launches.

On a GPU the small levels of a pyramid cost what their launches cost. So a kernel gets the whole
list, and each of its programs finds the piece that its part of the work is in. What the programs
find of a piece merges as pieces do.
"""

import triton
import triton.language as tl

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
def moments(
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
def merge(
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
def _affine(
    weights, biases, affine, inv_std, num_channels, c, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What is multiplied and what is added where the mean has been subtracted."""
    scale = inv_std
    bias = tl.zeros_like(inv_std)
    if HAS_WEIGHT:
        scale *= tl.load(_number(weights, affine) + c, mask=c < num_channels, other=0.0)
    if HAS_BIAS:
        bias += tl.load(_number(biases, affine) + c, mask=c < num_channels, other=0.0)
    return scale, bias


@triton.jit
def _before_relu(grad, off, scale, bias, dtype: tl.constexpr):
    """The gradient of a ReLU's input, from that of its output.

    The input is what the forward pass has rounded it to, as whoever computes a ReLU by itself gets
    it. (The output is somebody else's, and would have to be read.)
    """
    value = (off * scale + bias).to(dtype)
    return tl.where(value <= 0, 0.0, grad)  # one of NaN lets it through


@triton.jit
def _scaled(
    x, y, begin, end, places, num_channels, c, mean, scale, bias, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    mean = _spread(mean, CHANNELS_LAST)
    scale = _spread(scale, CHANNELS_LAST)
    bias = _spread(bias, CHANNELS_LAST)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = (value - mean) * scale + bias
        if RELU:
            value = tl.where(value <= 0, 0.0, value)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@_jit
def normalize(
    xs, ys, firsts, samples, places, batch_of, affine_of, means, variances, weights, biases,
    num_channels, tiles, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x = _of_piece(row, firsts, xs)
    y = _of_piece(row, firsts, ys)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    batch = _size(_of_piece(row, firsts, batch_of))
    affine = _size(_of_piece(row, firsts, affine_of))
    mean, inv_std = _statistics(means, variances, batch, num_channels, c, EPS)
    scale, bias = _affine(weights, biases, affine, inv_std, num_channels, c, HAS_WEIGHT, HAS_BIAS)
    if here % 16 == 0:
        _scaled(
            x, y, begin, end, here, num_channels, c, mean, scale, bias, RELU, CHANNELS_LAST,
            WIDTH, True,
        )  # fmt: skip
    else:
        _scaled(
            x, y, begin, end, here, num_channels, c, mean, scale, bias, RELU, CHANNELS_LAST,
            WIDTH, False,
        )  # fmt: skip


@triton.jit
def _sums_of(
    dy, x, begin, end, places, num_channels, c, mean, inv_std, scale, bias, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    wide = _spread(mean, CHANNELS_LAST)
    scale = _spread(scale, CHANNELS_LAST)
    bias = _spread(bias, CHANNELS_LAST)
    shape: tl.constexpr = (WIDTH, CHANNELS) if CHANNELS_LAST else (CHANNELS, WIDTH)
    plain = tl.zeros(shape, mean.dtype)
    products = tl.zeros(shape, mean.dtype)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        off = value - wide
        if RELU:
            grad = _before_relu(grad, off, scale, bias, x.dtype.element_ty)
        plain += grad
        products += tl.where(mask, grad * off, 0.0)
    return _total(plain, CHANNELS_LAST), _total(products, CHANNELS_LAST) * inv_std


@_jit
def sums(
    dys, xs, firsts, samples, places, batch_of, affine_of, means, variances, weights, biases, out,
    num_channels, tiles, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dy = _of_piece(row, firsts, dys)
    x = _of_piece(row, firsts, xs)
    here, begin, end = _tiles_of(row, firsts, samples, places, tiles, WIDTH)
    batch = _size(_of_piece(row, firsts, batch_of))
    affine = _size(_of_piece(row, firsts, affine_of))
    mean, inv_std = _statistics(means, variances, batch, num_channels, c, EPS)
    scale, bias = _affine(weights, biases, affine, inv_std, num_channels, c, HAS_WEIGHT, HAS_BIAS)
    if here % 16 == 0:
        plain, products = _sums_of(
            dy, x, begin, end, here, num_channels, c, mean, inv_std, scale, bias, RELU,
            CHANNELS_LAST, WIDTH, CHANNELS, True,
        )  # fmt: skip
    else:
        plain, products = _sums_of(
            dy, x, begin, end, here, num_channels, c, mean, inv_std, scale, bias, RELU,
            CHANNELS_LAST, WIDTH, CHANNELS, False,
        )  # fmt: skip
    at = out + row.to(tl.int64) * 2 * num_channels + c
    tl.store(at, plain, mask=c < num_channels)
    tl.store(at + num_channels, products, mask=c < num_channels)


@_jit
def add_up(
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
    dy, x, dx, begin, end, places, num_channels, c, mean, scale, bias, slope, offset,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    mean = _spread(mean, CHANNELS_LAST)
    scale = _spread(scale, CHANNELS_LAST)
    bias = _spread(bias, CHANNELS_LAST)
    slope = _spread(slope, CHANNELS_LAST)
    offset = _spread(offset, CHANNELS_LAST)
    for j in range(begin, end):
        offsets, mask, _ = _tile(j, places, num_channels, c, CHANNELS_LAST, WIDTH, ALIGNED)
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(mean.dtype)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(mean.dtype)
        off = value - mean
        if RELU:
            grad = _before_relu(grad, off, scale, bias, x.dtype.element_ty)
        value = grad * scale - (offset + off * slope)
        tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=mask)


@_jit
def inputs(
    dys, xs, dxs, firsts, samples, places, batch_of, affine_of, counts, means, variances, totals,
    weights, biases, num_channels, tiles, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
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
    scale, bias = _affine(weights, biases, affine, inv_std, num_channels, c, HAS_WEIGHT, HAS_BIAS)
    if here % 16 == 0:
        _inputs_of(
            dy, x, dx, begin, end, here, num_channels, c, mean, scale, bias, slope, offset,
            RELU, CHANNELS_LAST, WIDTH, True,
        )  # fmt: skip
    else:
        _inputs_of(
            dy, x, dx, begin, end, here, num_channels, c, mean, scale, bias, slope, offset,
            RELU, CHANNELS_LAST, WIDTH, False,
        )  # fmt: skip


@_jit
def update_emas(
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
