"""Normalization of several tensors by the statistics of all of them, without concatenating."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..moments import Moments


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias with constant statistics, as BN at test time.

    Args:
        x: shape (N, C, H, W). It may be empty, where ATen's backward would end the process.
        mean, var, weight, bias: shape (C,). No gradient flows to mean and var.
    """
    if x.numel() == 0:
        return _affine_of_nothing(x, weight, bias)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def joint_batch_norm(
    xs: Sequence[Tensor],
    moments: Moments,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: float,
) -> list[Tensor]:
    """Normalize tensors by the batch statistics of all of them instead of each one's own.

    Equal to batch normalization of the values of all tensors taken together, gradients included:
    the statistics depend on every input, and the backward pass takes that into account.

    Args:
        xs: tensors of shape (N_k, C, H_k, W_k). Any but not all may be empty.
        moments: the merged moments of exactly these tensors.
        weights, biases: one of shape (C,), or None, for each tensor.
        eps: added to the variance.

    Returns:
        For each tensor its normalized one, of the same shape, dtype and memory format.

    Raises:
        RuntimeError: from the backward pass, if second derivatives are asked for.
    """
    dtype = moments.mean.dtype
    affine = (None if p is None else p.to(dtype) for p in (*weights, *biases))
    flat = (*xs, *affine)
    return list(_JointBatchNorm.apply(moments, eps, len(xs), *flat))


class _JointBatchNorm(torch.autograd.Function):
    """y_k = (x_k - mean) / sqrt(var + eps) * weight_k + bias_k, mean and var of all x_k."""

    @staticmethod
    def forward(ctx: FunctionCtx, moments: Moments, eps: float, num: int, *flat: Tensor | None):
        xs, weights, biases = flat[:num], flat[num : 2 * num], flat[2 * num :]
        ctx.save_for_backward(*moments, *xs, *weights)
        ctx.eps, ctx.num = eps, num
        return tuple(
            normalize(x, moments.mean, moments.var, w, b, eps)
            for x, w, b in zip(xs, weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        saved, num = ctx.saved_tensors, ctx.num
        moments, xs, weights = Moments(*saved[:3]), saved[3 : 3 + num], saved[3 + num :]
        needs_x = tuple(ctx.needs_input_grad[3 : 3 + num])
        flat = _JointBatchNormBackward.apply(moments, ctx.eps, num, needs_x, *grads, *xs, *weights)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(g if n else None for g, n in zip(flat, needed, strict=True))


class _JointBatchNormBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it can be refused.

    With r = 1 / sqrt(var + eps), z = (x - mean) r and n values per channel in all,
    dx_k = r (w_k dy_k - 1/n sum_j w_j sum(dy_j) - z_k/n sum_j w_j sum(dy_j z_j)): Ioffe & Szegedy,
    Sec. 3, with the sums over the whole normalization batch.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        moments: Moments,
        eps: float,
        num: int,
        needs_x: tuple[bool, ...],
        *flat: Tensor | None,
    ):
        grads, xs, weights = flat[:num], flat[num : 2 * num], flat[2 * num :]
        sums = [_reduce(dy, x, moments, eps) for dy, x in zip(grads, xs, strict=True)]
        grad_biases, grad_weights = zip(*sums, strict=True)
        inv_std = (moments.var + eps).rsqrt()
        scale = -inv_std / moments.count.to(inv_std.dtype)
        offset = scale * _weighted_sum(weights, grad_biases)
        slope = scale * _weighted_sum(weights, grad_weights)
        grad_xs = [
            _grad_input(dy, x, moments, eps, slope, offset, inv_std if w is None else inv_std * w)
            if needed
            else None
            for dy, x, w, needed in zip(grads, xs, weights, needs_x, strict=True)
        ]
        return *grad_xs, *grad_weights, *grad_biases

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        raise RuntimeError(
            "second derivatives of batch normalization are not implemented for statistics that are "
            "shared between tensors, and for channels_last inputs on a CPU"
        )


def _reduce(dy: Tensor, x: Tensor, moments: Moments, eps: float) -> tuple[Tensor, Tensor]:
    """Per channel, the sum of dy and the sum of dy times the normalized x."""
    if x.numel() == 0:
        return torch.zeros_like(moments.mean), torch.zeros_like(moments.mean)
    # In evaluation mode, gradients of weight and bias alone: the two sums in one vectorized pass.
    # CUDA's kernel wants the batch statistics that this mode does not have to be empty, not None.
    nothing = moments.mean.new_empty(0)
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        dy,
        x,
        torch.ones_like(moments.mean),
        moments.mean,
        moments.var,
        nothing,
        nothing,
        False,
        eps,
        [False, True, True],
    )
    return grad_bias, grad_weight


def _weighted_sum(weights: Sequence[Tensor | None], sums: Sequence[Tensor]) -> Tensor:
    terms = [s if w is None else w * s for w, s in zip(weights, sums, strict=True)]
    return torch.stack(terms).sum(0)


def _grad_input(
    dy: Tensor,
    x: Tensor,
    moments: Moments,
    eps: float,
    slope: Tensor,
    offset: Tensor,
    dy_scale: Tensor,
) -> Tensor:
    """dy_scale dy + slope x^ + offset, in two passes and one allocation."""
    dx = normalize(x, moments.mean, moments.var, slope, offset, eps)
    return dx.addcmul_(dy, dy_scale.view(-1, 1, 1))


def _affine_of_nothing(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """An empty output that keeps x, weight and bias in the graph, with zero gradients.

    DistributedDataParallel waits for the gradient of every parameter.
    """
    shape = (-1,) + (1,) * (x.dim() - 2)
    y = x.clone() if weight is None else x * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)
