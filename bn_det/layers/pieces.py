"""What the kernels over lists of pieces are told and tell, whoever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Stack = tuple[Tensor, Tensor, Tensor]
"""Counts, means and biased variances of several sets of values: shapes (n,), (n, C) and (n, C)."""


class Normalization(NamedTuple):
    """How the pieces of a list are normalized: (x - mean) / sqrt(var + eps) * weight + bias.

    Attributes:
        batches: moments of normalization batches.
        batch_of: of each piece the number of its batch.
        weights, biases: of each affine of shape (C,), or all None.
        affine_of: of each piece the number of its affine.
        eps: added to the variance.
        relu: whether a ReLU follows, which is computed with it.
    """

    batches: Stack
    batch_of: tuple[int, ...]
    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    affine_of: tuple[int, ...]
    eps: float
    relu: bool = False
