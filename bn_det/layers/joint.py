"""Normalization of several tensors by the statistics of all of them, without concatenating."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import kernels
from .meeting import Place, meet
from .moments import Moments


def joint_batch_norm(
    xs: Sequence[Tensor],
    batches: Moments,
    batch_of: Sequence[int],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    affine_of: Sequence[int],
    eps: float,
    group: dist.ProcessGroup | None = None,
    place: Place | None = None,
) -> list[Tensor]:
    """Normalize each tensor by the statistics of the normalization batch that it is in.

    Equal to batch normalization of each batch's values taken together, gradients included: the
    statistics depend on every input, and the backward pass takes that into account.

    Args:
        xs: tensors of shape (N_k, C, H_k, W_k). Any may be empty.
        batches: the moments of each normalization batch, stacked: of exactly the tensors in it, on
            all ranks of the group.
        batch_of: for each tensor the index of its batch.
        weights, biases: of each affine one of shape (C,), or all None.
        affine_of: for each tensor the index of its affine.
        eps: added to the variance.
        group: the processes that batches have been merged over; every one of them has to run the
            backward pass, which is one collective. Gradients of weights and biases are those of
            this process's tensors, for DistributedDataParallel to average.
        place: with a group, where the ranks have to be in the forward pass.

    Returns:
        For each tensor its normalized one, of the same shape, dtype and memory format.

    Raises:
        RuntimeError: from the backward pass, if second derivatives are asked for.
    """
    dtype = batches.mean.dtype
    affine = (None if p is None else p.to(dtype) for p in (*weights, *biases))
    anchor = None if group is None else _ANCHOR
    call = _Call(tuple(batch_of), tuple(affine_of), len(weights), eps, group, place)
    return list(_JointBatchNorm.apply(call, anchor, *batches, *xs, *affine))


_ANCHOR = torch.zeros((), requires_grad=True)
"""What needs a gradient on every rank, and gets none.

Otherwise a rank whose tensors happen to need none (zeros made up for no proposals) would be missing
from the collective of the backward pass. A graph that is compiled cannot make one.
"""


class _Call(NamedTuple):
    """What both passes need beside tensors."""

    batch_of: tuple[int, ...]
    affine_of: tuple[int, ...]
    num_affines: int
    eps: float
    group: dist.ProcessGroup | None
    place: Place | None

    @property
    def num_tensors(self) -> int:
        return len(self.batch_of)


class _JointBatchNorm(torch.autograd.Function):
    """y_k = (x_k - mean) / sqrt(var + eps) * weight + bias, of the batch and affine of k."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, anchor: Tensor | None, *flat: Tensor | None):
        num = 3 + call.num_tensors
        batches, xs = flat[:3], flat[3:num]
        weights, biases = flat[num : num + call.num_affines], flat[num + call.num_affines :]
        ctx.save_for_backward(*batches, *xs, *weights)
        ctx.call = call
        return tuple(
            kernels.normalize(xs, batches, call.batch_of, weights, biases, call.affine_of, call.eps)
        )

    @staticmethod
    def backward(ctx: FunctionCtx, *dys: Tensor):
        needed = ctx.needs_input_grad[_NUM_CONSTANT:]
        needs_x = any(needed[: ctx.call.num_tensors])
        inputs = ctx.call, needs_x, *ctx.saved_tensors, *dys
        if torch.is_grad_enabled():
            flat = _JointBatchNormBackward.apply(*inputs)
        else:
            flat = _backward(*inputs)
        wanted = [g if n else None for g, n in zip(flat, needed, strict=True)]
        return *[None] * _NUM_CONSTANT, *wanted


_NUM_CONSTANT = 5
"""Inputs without a gradient: the call, the anchor, and the moments of the batches."""


class _JointBatchNormBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it can be refused."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, needs_x: bool, *flat: Tensor | None):
        return _backward(call, needs_x, *flat)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor):
        raise RuntimeError(
            "second derivatives of batch normalization are not implemented for statistics that are "
            "shared between tensors or processes, and for channels_last inputs on a CPU"
        )


def _backward(call: _Call, needs_x: bool, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of tensors, weights and biases.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Sec. 3, with the two sums over the whole
    normalization batch, times the weights of the tensors in it.
    """
    num = 3 + call.num_tensors
    batches, xs, dys = flat[:3], flat[3:num], flat[num + call.num_affines :]
    weights = flat[num : num + call.num_affines]
    pieces = dys, xs, batches, call.batch_of, weights, call.affine_of
    meeting = None
    if call.group is not None:
        place = call.place and call.place._replace(stage="backward pass")
        meeting = meet(place, call.group)
    of_batches, of_affines = kernels.backward_sums(*pieces, call.eps)
    if meeting is not None:
        sum_up = partial(dist.all_reduce, of_batches, dist.ReduceOp.SUM)
        meeting.exchange(sum_up)
    dxs = [None] * len(xs)
    if needs_x:
        dxs = kernels.backward_inputs(*pieces, of_batches, call.eps)
    grad_biases, grad_weights = of_affines.unbind(1)
    return *dxs, *grad_weights.unbind(), *grad_biases.unbind()
