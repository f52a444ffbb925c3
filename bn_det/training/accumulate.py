"""Gradients of several batches for one step: a larger SGD batch, the same normalization batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import check_positive


def accumulate(
    model: nn.Module,
    batches: Sequence[Any],
    losses_of: Callable[[nn.Module, Any], Mapping[str, Tensor]],
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> dict[str, Tensor]:
    """Add to the gradients those of the mean of the batches' losses, one batch after the other.

    Where a loss is a mean over images, batches have as many, and no layer looks at a batch, that is
    the gradient of one large batch. BatchNorm keeps the normalization batch of a single one. A loss
    that is divided by what a batch contains (its positives, the sampled RoIs) weighs images
    otherwise than in a large batch.

    Processes of DistributedDataParallel exchange gradients once, with the last batch.

    Args:
        model: in training mode, with gradients as they are to be added to.
        losses_of: from the model and a batch to its losses by name.
        backward: what is called with a batch's share of the loss.

    Returns:
        the mean losses by name, without graph.
    """
    wrapper = model if isinstance(model, DistributedDataParallel) else None
    mean: dict[str, Tensor] = {}
    for k, batch in enumerate(batches, 1):
        with wrapper.no_sync() if wrapper and k < len(batches) else nullcontext():
            losses = losses_of(model, batch)
            backward(reduce(torch.add, losses.values()) / len(batches))
        for name, value in losses.items():
            mean[name] = mean.get(name, 0) + value.detach() / len(batches)
    return mean


class GradientAccumulation:
    """Has an optimizer step with the mean gradient of several batches.

    For training loops that step with each batch and cannot be changed; otherwise see
    :func:`accumulate`. Each call of the optimizer's ``step`` hands over the gradients of a batch,
    and the last of ``num_batches`` calls updates the parameters. In those before, parameters have
    no gradient, with which torch's optimizers leave them and their state alone. What is to see the
    mean gradient, such as ``AdaptiveGradientClipping``, is to be attached after this.

    It takes the memory of one more gradient. What it has of a group that is not complete is in no
    checkpoint: a resumed training begins a group.

    Args:
        num_batches: of a step.

    Raises:
        InputError: it is less than 1.
    """

    def __init__(self, num_batches: int) -> None:
        check_positive("num_batches", num_batches)
        self.num_batches = num_batches
        self._num_calls = 0
        self._means: dict[Tensor, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have it called before each step of an optimizer."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    share = parameter.grad / self.num_batches
                    self._means[parameter] = self._means.get(parameter, 0) + share
                    parameter.grad = None
        self._num_calls += 1
        if self._num_calls % self.num_batches == 0:
            for parameter, mean in self._means.items():
                parameter.grad = mean
            self._means = {}
