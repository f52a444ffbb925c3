"""Normalization of several tensors by the statistics of all of them, without concatenating."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .meeting import Place, meet
from .pieces import Normalization

if TYPE_CHECKING:
    from .triton_lists import Grid


def joint_batch_norm(
    xs: Sequence[Tensor],
    how: Normalization,
    grid: Grid | None = None,
    group: dist.ProcessGroup | None = None,
    place: Place | None = None,
) -> list[Tensor]:
    """Normalize each tensor by the statistics of the normalization batch that it is in.

    Equal to batch normalization of each batch's values taken together, gradients included: the
    statistics depend on every input, and the backward pass takes that into account.

    Args:
        xs: tensors of shape (N_k, C, H_k, W_k). Any may be empty.
        how: its batches are of exactly the tensors in them, on all ranks of the group.
        grid: that of the tensors, by :func:`bn_det.layers.kernels.grid_of`.
        group: the processes that batches have been merged over; every one of them has to run the
            backward pass, which is one collective. Gradients of weights and biases are those of
            this process's tensors, for DistributedDataParallel to average.
        place: with a group, where the ranks have to be in the forward pass.

    Returns:
        For each tensor its normalized one, of the same shape, dtype and memory format.

    Raises:
        RuntimeError: from the backward pass, if second derivatives are asked for.
    """
    dtype = how.batches[1].dtype
    affine = (None if p is None else p.to(dtype) for p in (*how.weights, *how.biases))
    of_how = how.batch_of, how.affine_of, len(how.weights), how.eps, how.relu
    call = _Call(*of_how, grid, group, place)
    anchor = None if group is None else _ANCHOR
    return list(_JointBatchNorm.apply(call, anchor, *how.batches, *xs, *affine))


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
    relu: bool
    grid: Grid | None
    group: dist.ProcessGroup | None
    place: Place | None

    def parts(
        self, flat: tuple[Any, ...]
    ) -> tuple[Normalization, Sequence[Tensor], Sequence[Tensor]]:
        """How it is normalized, the tensors, and what follows weights and biases.

        Args:
            flat: tensors, or None of a weight or bias that there is not.
        """
        first = 3 + len(self.batch_of)
        second, third = first + self.num_affines, first + 2 * self.num_affines
        how = Normalization(
            flat[:3],
            self.batch_of,
            flat[first:second],
            flat[second:third],
            self.affine_of,
            self.eps,
            self.relu,
        )
        return how, flat[3:first], flat[third:]


class _JointBatchNorm(torch.autograd.Function):
    """y_k = (x_k - mean) / sqrt(var + eps) * weight + bias, of the batch and affine of k."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, anchor: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        how, xs, _ = call.parts(flat)
        # A bias says what came through a ReLU, and nothing else.
        biases = how.biases if call.relu else [None] * call.num_affines
        ctx.save_for_backward(*how.batches, *xs, *how.weights, *biases)
        ctx.call = call
        return tuple(kernels.normalize(xs, how, call.grid))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[_NUM_CONSTANT:]
        needs_x = any(needed[: len(dys)])
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
    def forward(
        ctx: Any, call: _Call, needs_x: bool, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _backward(call, needs_x, *flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "second derivatives of batch normalization are not implemented for statistics that are "
            "shared between tensors or processes, for lists of tensors by Triton's kernels (on a "
            "GPU), and for channels_last inputs on a CPU"
        )


def _backward(call: _Call, needs_x: bool, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of tensors, weights and biases.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Sec. 3, with the two sums over the whole
    normalization batch, times the weights of the tensors in it.
    """
    how, xs, dys = call.parts(flat)
    grid = call.grid if kernels.one_launch(dys) is not None else None
    meeting = None
    if call.group is not None:
        place = call.place and call.place._replace(stage="backward pass")
        meeting = meet(place, call.group)
    of_batches, of_affines = kernels.backward_sums(dys, xs, how, grid)
    if meeting is not None:
        sum_up = partial(dist.all_reduce, of_batches, dist.ReduceOp.SUM)
        meeting.exchange(sum_up)
    dxs: Sequence[Tensor | None] = [None] * len(xs)
    if needs_x:
        dxs = kernels.backward_inputs(dys, xs, how, of_batches, grid)
    grad_biases, grad_weights = of_affines.unbind(1)
    return *dxs, *grad_weights.unbind(), *grad_biases.unbind()
