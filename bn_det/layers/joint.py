"""Normalization of several tensors by the statistics of all of them, without concatenating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .moments import Moments


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
    batches: Sequence[Moments],
    batch_of: Sequence[int],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Normalize each tensor by the statistics of the normalization batch that it is in.

    Equal to batch normalization of each batch's values taken together, gradients included: the
    statistics depend on every input, and the backward pass takes that into account.

    Args:
        xs: tensors of shape (N_k, C, H_k, W_k). Any may be empty.
        batches: the moments of each normalization batch: of exactly the tensors in it, on all
            ranks of the group.
        batch_of: for each tensor the index of its batch.
        weights, biases: one of shape (C,), or None, for each tensor.
        eps: added to the variance.
        group: the processes that batches have been merged over; every one of them has to run the
            backward pass, which is one collective. Gradients of weights and biases are those of
            this process's tensors, for DistributedDataParallel to average.

    Returns:
        For each tensor its normalized one, of the same shape, dtype and memory format.

    Raises:
        RuntimeError: from the backward pass, if second derivatives are asked for.
    """
    dtype = batches[0].mean.dtype
    affine = (None if p is None else p.to(dtype) for p in (*weights, *biases))
    # It needs a gradient on every rank. Otherwise one whose tensors happen to need none (zeros made
    # up for no proposals) would be missing from the collective.
    anchor = None
    if group is not None:
        anchor = torch.zeros((), dtype=dtype, requires_grad=torch.is_grad_enabled())
    call = _Call(tuple(batch_of), len(batches), eps, group)
    return list(_JointBatchNorm.apply(call, anchor, *_flatten(batches), *xs, *affine))


class _Call(NamedTuple):
    """What both passes need beside tensors."""

    batch_of: tuple[int, ...]
    num_batches: int
    eps: float
    group: dist.ProcessGroup | None

    def unflatten(self, flat: Sequence[Tensor]) -> tuple[list[Moments], Sequence[Tensor | None]]:
        """Each tensor's moments, and what follows the moments."""
        size = 3 * self.num_batches
        batches = [Moments(*flat[k : k + 3]) for k in range(0, size, 3)]
        return [batches[b] for b in self.batch_of], flat[size:]


def _flatten(batches: Sequence[Moments]) -> list[Tensor]:
    return [tensor for moments in batches for tensor in moments]


class _JointBatchNorm(torch.autograd.Function):
    """y_k = (x_k - mean) / sqrt(var + eps) * weight_k + bias_k, mean and var of k's batch."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, anchor: Tensor | None, *flat: Tensor | None):
        moments, rest = call.unflatten(flat)
        num = len(call.batch_of)
        xs, weights, biases = rest[:num], rest[num : 2 * num], rest[2 * num :]
        ctx.save_for_backward(*flat[:-num])
        ctx.call = call
        return tuple(
            normalize(x, m.mean, m.var, w, b, call.eps)
            for x, m, w, b in zip(xs, moments, weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        num, num_constant = len(ctx.call.batch_of), 2 + 3 * ctx.call.num_batches
        needed = ctx.needs_input_grad[num_constant:]
        flat = _JointBatchNormBackward.apply(ctx.call, needed[:num], *ctx.saved_tensors, *grads)
        wanted = [g if n else None for g, n in zip(flat, needed, strict=True)]
        return *[None] * num_constant, *wanted


class _JointBatchNormBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it can be refused.

    With r = 1 / sqrt(var + eps), z = (x - mean) r and n values per channel in the batch,
    dx_k = r (w_k dy_k - 1/n sum_j w_j sum(dy_j) - z_k/n sum_j w_j sum(dy_j z_j)): Ioffe & Szegedy,
    Sec. 3, with the sums over the whole normalization batch.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, needs_x: tuple[bool, ...], *flat: Tensor | None):
        moments, rest = call.unflatten(flat)
        num = len(call.batch_of)
        xs, weights, grads = rest[:num], rest[num : 2 * num], rest[2 * num :]
        sums = [_reduce(dy, x, m, call.eps) for dy, x, m in zip(grads, xs, moments, strict=True)]
        batch_sums = _sum_over_batches(call, sums, weights)
        grad_xs = [
            _grad_input(dy, x, m, call.eps, batch_sums[b], w) if needed else None
            for dy, x, m, b, w, needed in zip(
                grads, xs, moments, call.batch_of, weights, needs_x, strict=True
            )
        ]
        grad_biases, grad_weights = zip(*sums, strict=True)
        return *grad_xs, *grad_weights, *grad_biases

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        raise RuntimeError(
            "second derivatives of batch normalization are not implemented for statistics that are "
            "shared between tensors or processes, and for channels_last inputs on a CPU"
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


def _sum_over_batches(
    call: _Call, sums: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor | None]
) -> Tensor:
    """Shape (number of batches, 2, C): the weighted sums of each batch's tensors, on all ranks."""
    totals = sums[0][0].new_zeros(call.num_batches, 2, len(sums[0][0]))
    for batch, pair, weight in zip(call.batch_of, sums, weights, strict=True):
        pair = torch.stack(pair)
        totals[batch] += pair if weight is None else pair * weight
    if call.group is not None:
        dist.all_reduce(totals, group=call.group)
    return totals


def _grad_input(
    dy: Tensor,
    x: Tensor,
    moments: Moments,
    eps: float,
    batch_sums: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """dx in two passes and one allocation: an affine function of z, and then of dy."""
    inv_std = (moments.var + eps).rsqrt()
    scale = -inv_std / moments.count.clamp(min=1).to(inv_std.dtype)
    offset, slope = scale * batch_sums
    dx = normalize(x, moments.mean, moments.var, slope, offset, eps)
    dy_scale = inv_std if weight is None else inv_std * weight
    return dx.addcmul_(dy, dy_scale.view(-1, 1, 1))


def _affine_of_nothing(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """An empty output that keeps x, weight and bias in the graph, with zero gradients.

    DistributedDataParallel waits for the gradient of every parameter.
    """
    shape = (-1,) + (1,) * (x.dim() - 2)
    y = x.clone() if weight is None else x * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)
