"""Statistics, and what else fits them, put into the layers of a model: all of it, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class Value(NamedTuple):
    """A tensor of a layer, by the layer's name, and what is to be in it."""

    name: str
    tensor: Tensor
    value: Tensor


@torch.no_grad()
def write_all(what: str, values: Sequence[Value]) -> None:
    """Write values; none of them if one cannot be, or if that is interrupted.

    Args:
        what: begins messages.

    Raises:
        InputError: one does not fit the type of its tensor.
    """
    for name, tensor, value in values:
        if not value.to(tensor.dtype).isfinite().all():
            raise InputError(
                f"{what}: {name}: {value.abs().max():.4g} does not fit a buffer of "
                f"{tensor.dtype}; make the model's buffers float32. Nothing is changed"
            )
    before = [(tensor, tensor.clone()) for _, tensor, _ in values]
    try:
        for _, tensor, value in values:
            tensor.copy_(value)
    except BaseException:
        for tensor, value in before:
            tensor.copy_(value)
        raise
