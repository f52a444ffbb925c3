"""Normalization of several tensors by the statistics of all of them, without concatenating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .kernels import backward_inputs, backward_sums, normalize
from .moments import Moments


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

    def unflatten(self, flat: Sequence[Tensor]) -> tuple[Moments, Sequence[Tensor | None]]:
        """Counts, means and variances, each a list with those of each tensor; and what follows."""
        size = 3 * self.num_batches
        batches = [flat[k : k + 3] for k in range(0, size, 3)]
        return Moments(*zip(*(batches[b] for b in self.batch_of), strict=True)), flat[size:]


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
        return tuple(normalize(xs, moments.mean, moments.var, weights, biases, call.eps))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        num, num_constant = len(ctx.call.batch_of), 2 + 3 * ctx.call.num_batches
        needed = ctx.needs_input_grad[num_constant:]
        flat = _JointBatchNormBackward.apply(ctx.call, needed[:num], *ctx.saved_tensors, *grads)
        wanted = [g if n else None for g, n in zip(flat, needed, strict=True)]
        return *[None] * num_constant, *wanted


class _JointBatchNormBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it can be refused.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Sec. 3, with the two sums over the whole
    normalization batch, times the weights of the tensors in it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, needs_x: tuple[bool, ...], *flat: Tensor | None):
        moments, rest = call.unflatten(flat)
        num = len(call.batch_of)
        xs, weights, grads = rest[:num], rest[num : 2 * num], rest[2 * num :]
        statistics = moments.mean, moments.var
        sums = backward_sums(grads, xs, *statistics, call.eps)
        batch_sums = _sum_over_batches(call, sums, weights)
        sums_of = [batch_sums[b] for b in call.batch_of]
        pieces = list(zip(grads, xs, *statistics, weights, sums_of, moments.count, strict=True))
        needed = [piece for piece, is_needed in zip(pieces, needs_x, strict=True) if is_needed]
        found = iter(backward_inputs(*zip(*needed, strict=True), call.eps) if needed else ())
        grad_xs = [next(found) if is_needed else None for is_needed in needs_x]
        grad_biases, grad_weights = zip(*sums, strict=True)
        return *grad_xs, *grad_weights, *grad_biases

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        raise RuntimeError(
            "second derivatives of batch normalization are not implemented for statistics that are "
            "shared between tensors or processes, and for channels_last inputs on a CPU"
        )


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
