"""Which samples of a tensor make a normalization batch, where not all of them do."""

from __future__ import annotations

import torch
from torch import Tensor

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
        ValueError: groups has another shape.
    """
    if groups is not None:
        if groups.shape != (num_samples,):
            raise ValueError(
                f"groups: shape {tuple(groups.shape)} is not accepted; the batch has "
                f"{num_samples} samples, use ({num_samples},)"
            )
        return Partition(groups.unique(return_counts=True)[1].tolist() or [0], groups.argsort())
    num_batches = max(num_samples // ghost_size, 1) if ghost_size else 1
    if num_batches == 1:
        return Partition([num_samples], None)
    sizes = [ghost_size] * num_batches
    sizes[-1] += num_samples - sum(sizes)
    return Partition(sizes, torch.randperm(num_samples) if ghost_order == "random" else None)
