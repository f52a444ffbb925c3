"""Gradients of several batches for one step: a larger SGD batch, the same normalization batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
    mean: dict[str, Tensor] = {}
    for k, batch in enumerate(batches, 1):
        is_partial = k < len(batches) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if is_partial else nullcontext():
            losses = losses_of(model, batch)
            backward(sum(losses.values()) / len(batches))
        for name, value in losses.items():
            mean[name] = mean.get(name, 0) + value.detach() / len(batches)
    return mean
