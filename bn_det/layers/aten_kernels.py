"""The kernels of :mod:`bn_det.layers.kernels` as calls of ATen, which runs everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouping import grouped
from .pieces import Normalization, Stack


def moments(xs: Sequence[Tensor]) -> Stack:
    """Of each piece, in float32 at least; zeros of an empty one."""
    means, variances = zip(*[_mean_var(x) for x in xs], strict=True)
    mean, var = torch.stack([*means, *variances]).unflatten(0, (2, -1))
    return _counts(xs), mean, var


def merge(stack: Stack, sets: Sequence[Sequence[int]]) -> Stack:
    """Those of sets of the rows of a stack."""
    if all(len(rows) == 1 for rows in sets):
        return _selected(stack, [row for (row,) in sets])
    order, parts = [], []
    of_size = grouped(range(len(sets)), [len(rows) for rows in sets])
    for size, numbers in of_size.items():  # those of a size at once
        rows = [sets[k][n] for n in range(size) for k in numbers]
        count, mean, var = (t.unflatten(0, (size, -1)) for t in _selected(stack, rows))
        parts.append(merged_rows(count, mean, var) if size > 1 else (count[0], mean[0], var[0]))
        order += numbers
    if len(parts) == 1:
        return parts[0]
    count, mean, var = (torch.cat(field) for field in zip(*parts, strict=True))
    return _selected((count, mean, var), [order.index(k) for k in range(len(sets))])


def merged_rows(counts: Tensor, means: Tensor, variances: Tensor) -> Stack:
    """Merge over the first dimension: counts of shape (n, *), means and variances (n, *, C)."""
    # Float64 costs nothing at this size, and keeps a merge of many from drifting.
    total = counts.sum(0)
    weights = (counts / total.clamp(min=1)).unsqueeze(-1)
    mean = (weights * means).sum(0)  # in float64, as counts and so weights are
    shift = means - mean
    var = (weights * torch.addcmul(variances, shift, shift)).sum(0)
    return total, mean.to(means.dtype), var.to(means.dtype)


def normalize(xs: Sequence[Tensor], how: Normalization) -> list[Tensor]:
    """See :func:`bn_det.layers.kernels.normalize`."""
    _, means, variances = (stack.unbind() for stack in how.batches)
    ys = [
        normalize_one(x, means[b], variances[b], how.weights[a], how.biases[a], how.eps)
        for x, b, a in zip(xs, how.batch_of, how.affine_of, strict=True)
    ]
    return [y.relu_() for y in ys] if how.relu else ys


def backward_sums(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization
) -> tuple[Tensor, Tensor]:
    """See :func:`bn_det.layers.kernels.backward_sums`."""
    dys = _before_relu(dys, xs, how)
    _, means, variances = (stack.unbind() for stack in how.batches)
    sums = [
        of_piece
        for dy, x, b in zip(dys, xs, how.batch_of, strict=True)
        for of_piece in _sums(dy, x, means[b], variances[b], how.eps)
    ]
    pairs = torch.stack(sums).unflatten(0, (-1, 2))
    of_affines = _added_up(pairs, how.affine_of, len(how.weights))
    weights = [weight for weight in how.weights if weight is not None]  # all, or none
    if len(weights) == len(means) == 1:  # the same sum, weighted once
        return of_affines * weights[0], of_affines
    if len(weights) > 1:
        pairs = pairs * torch.stack([weights[a] for a in how.affine_of]).unsqueeze(1)
    elif weights:
        pairs = pairs * weights[0]
    return _added_up(pairs, how.batch_of, len(means)), of_affines


def _added_up(pairs: Tensor, numbers: Sequence[int], size: int) -> Tensor:
    """The sum of the rows of each number; shape (size, *). Zeros where a number has none."""
    if list(numbers) == list(range(size)):
        return pairs
    if size == 1:
        return pairs.sum(0, keepdim=True)
    sums = pairs.new_zeros(size, *pairs.shape[1:])
    for pair, number in zip(pairs, numbers, strict=True):
        sums[number].add_(pair)
    return sums


def backward_inputs(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization, sums: Tensor
) -> list[Tensor]:
    """See :func:`bn_det.layers.kernels.backward_inputs`."""
    dys = _before_relu(dys, xs, how)
    counts, means, variances = how.batches
    inv_std = (variances + how.eps).rsqrt()
    # Of an empty batch they are not finite, and no piece with a value is in it.
    share = -inv_std / counts.to(inv_std.dtype).unsqueeze(1)
    # Unbound, not by index, of which Inductor makes other gradients (torch 2.14).
    of_z = (share.unsqueeze(1) * sums).unbind()  # an affine of it
    mean_of, var_of, inv_std_of = means.unbind(), variances.unbind(), inv_std.unbind()
    of_dy = {
        (b, a): inv_std_of[b] if (weight := how.weights[a]) is None else inv_std_of[b] * weight
        for b, a in dict.fromkeys(zip(how.batch_of, how.affine_of, strict=True))
    }
    dxs = []
    for dy, x, b, a in zip(dys, xs, how.batch_of, how.affine_of, strict=True):
        # In two passes and one allocation: an affine function of z, and then of dy.
        offset, slope = of_z[b].unbind()
        dx = normalize_one(x, mean_of[b], var_of[b], slope, offset, how.eps)
        dxs.append(dx.addcmul_(dy, of_dy[b, a].view(-1, *[1] * (x.dim() - 2))))
    return dxs


def _before_relu(
    dys: Sequence[Tensor], xs: Sequence[Tensor], how: Normalization
) -> Sequence[Tensor]:
    """The gradients of a ReLU's inputs, from those of its outputs."""
    if not how.relu:
        return dys
    ys = normalize(xs, how)
    # Not masked_fill, which loses channels_last: ATen's sums of mixed formats are half in bfloat16.
    return [torch.ops.aten.threshold_backward(dy, y, 0) for dy, y in zip(dys, ys, strict=True)]


def _counts(xs: Sequence[Tensor]) -> Tensor:
    sizes = [x.numel() // max(x.shape[1], 1) for x in xs]
    if xs[0].device.type == "cpu":
        return torch.tensor(sizes, dtype=torch.float64, device="cpu")
    # Without a copy, which another device would have to be waited for.
    dtype, device = torch.float64, xs[0].device
    if torch.compiler.is_compiling():  # where a size has no number yet
        return torch.stack([torch.full((), n, dtype=dtype, device=device) for n in sizes])
    counts = torch.zeros(len(sizes), dtype=dtype, device=device)
    torch._foreach_add_(counts.unbind(), list(map(float, sizes)))  # one launch for all
    return counts


def _selected(stack: Stack, rows: Sequence[int]) -> Stack:
    first, last = rows[0], rows[-1] + 1
    if list(rows) == list(range(len(stack[0]))):
        return stack
    if list(rows) == list(range(first, last)):
        count, mean, var = (field[first:last] for field in stack)
    else:
        count, mean, var = (torch.stack([field[row] for row in rows]) for field in stack)
    return count, mean, var


_PART_SIZE = 2**19
"""Values that are centered at once: 2 MiB of float32."""


def _mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        return zeros, zeros.clone()
    return (_two_pass_mean_var if x.device.type == "cpu" else _fused_mean_var)(x, dtype)


def _two_pass_mean_var(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Corrected two-pass algorithm on the CPU.

    ``batch_norm_update_stats`` takes three times as long on large NCHW inputs (its second pass is
    not vectorized) and loses the variance of channels_last data with a large mean;
    ``torch.var_mean`` takes ten times as long.
    """
    shape = x.shape[:2]
    rows = x.reshape(shape.numel(), -1)
    is_small = rows.numel() <= _PART_SIZE
    mean, sums, squares = (_two_passes if is_small else _two_passes_in_parts)(rows, shape, dtype)
    count = rows.numel() // len(mean)
    rounding = sums / count
    return mean + rounding, (squares / count - rounding.square()).clamp(min=0)


def _two_passes(
    rows: Tensor, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean per channel, and the sums of what is centered by it, and of its squares.

    Args:
        rows: one for each channel of each sample.
        shape: how many of both.
    """
    x = rows.view(*shape, -1)
    mean = x.mean((0, 2), dtype=dtype)
    centered = x - mean.unsqueeze(1)
    return mean, centered.sum((0, 2)), centered.square_().sum((0, 2))


def _two_passes_in_parts(
    rows: Tensor, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of some rows at a time, in one buffer.

    Memory for all would be fresh, and slow, at each call.
    """
    mean = rows.mean(1, dtype=dtype).view(shape).mean(0)
    shift = mean.expand(shape).reshape(-1, 1)
    step = max(1, _PART_SIZE // rows.shape[1])
    buffer = torch.empty(min(step, len(rows)), rows.shape[1], dtype=dtype)
    sums, norms = [], []
    for part, part_shift in zip(rows.split(step), shift.split(step), strict=True):
        centered = torch.sub(part, part_shift, out=buffer[: len(part)])
        sums.append(centered.sum(1))
        norms.append(torch.linalg.vector_norm(centered, dim=1))
    return mean, torch.cat(sums).view(shape).sum(0), torch.cat(norms).square().view(shape).sum(0)


def _fused_mean_var(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One kernel (Welford's algorithm on CUDA, in every memory format)."""
    mean = var = None
    if dtype != x.dtype:  # without buffers of it, half inputs would get half statistics
        mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    return torch.batch_norm_update_stats(x, mean, var, 0.0)


def normalize_one(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, differentiable in x, weight and bias.

    Args:
        mean, var: may be None for an empty x.
    """
    if x.numel() == 0:  # for which ATen's backward would end the process
        return _affine_of_nothing(x, weight, bias)
    holds_less = torch.is_grad_enabled() and x.requires_grad and not _learns(weight, bias)
    holds_less = holds_less and not torch.jit.is_tracing()  # the same with and without gradients
    if holds_less and mean is not None and var is not None:
        return _scale_and_shift(x, mean, var, weight, bias, eps)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    return any(p is not None and p.requires_grad for p in (weight, bias))


def _scale_and_shift(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The same, but that a scale per channel is all that is held for the backward pass.

    ``F.batch_norm`` holds x, whatever it is that needs a gradient.
    """
    # In float32 at least, as F.batch_norm does it whatever the type of the statistics is.
    scale = (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)


def _affine_of_nothing(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """An empty output that keeps x, weight and bias in the graph, with zero gradients.

    DistributedDataParallel waits for the gradient of every parameter.
    """
    shape = (-1,) + (1,) * (x.dim() - 2)
    y = x.clone() if weight is None else x * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)


def _sums(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    # In evaluation mode, gradients of weight and bias alone: the two sums in one vectorized pass.
    # CUDA's kernel wants the batch statistics that this mode does not have to be empty, not None,
    # and any weight, of whose values these gradients do not depend.
    nothing = mean.new_empty(0)
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        dy,
        x,
        mean,
        mean,
        var,
        nothing,
        nothing,
        False,
        eps,
        [False, True, True],
    )
    return grad_bias, grad_weight
