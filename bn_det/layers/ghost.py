"""Which samples of a tensor make a normalization batch, where not all of them do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .partition import Partition

GHOST_ORDERS = ("contiguous", "random")
"""Which samples a ghost batch takes."""


def ghost_batches(
    num_samples: int,
    ghost_size: int | None,
    ghost_order: str = "contiguous",
    groups: Tensor | None = None,
) -> Partition:
    """The partition of samples into normalization batches.

    Args:
        ghost_size: samples in each; what remains goes to the last. None for all samples.
        ghost_order: "contiguous", or "random" by torch's global generator.
        groups: instead of a size, an integer for each sample, shape (N,): equal ones are together.

    Raises:
        InputError: groups has another shape, or no integers.
    """
    if groups is not None:
        _check(groups, num_samples)
        return Partition(groups.unique(return_counts=True)[1].tolist() or [0], groups.argsort())
    num_batches = max(num_samples // ghost_size, 1) if ghost_size else 1
    if not ghost_size or num_batches == 1:
        return Partition([num_samples], None)
    sizes = [ghost_size] * num_batches
    sizes[-1] += num_samples - sum(sizes)
    return Partition(sizes, torch.randperm(num_samples) if ghost_order == "random" else None)


def _check(groups: Tensor, num_samples: int) -> None:
    if not isinstance(groups, Tensor) or groups.is_floating_point():
        kind = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise InputError(f"groups: {kind} is not accepted; use a tensor of integers")
    if groups.shape != (num_samples,):
        raise InputError(
            f"groups: shape {tuple(groups.shape)} is not accepted; the batch has {num_samples} "
            f"samples, use ({num_samples},)"
        )
