"""Weights by their names: read from a file, and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LOAD_ERRORS, InputError, reason_of

State = Mapping[str, Tensor]


def read_checkpoint(path: str | os.PathLike) -> Any:
    """What ``torch.load`` reads of a file: tensors and plain data only, on the CPU.

    Raises:
        InputError: it cannot be read so; the message begins with the path.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as e:
        raise InputError(f"{path}: cannot be loaded as a checkpoint: {reason_of(e)}") from e


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint has under "model", or by itself, as :func:`read_checkpoint` reads it.

    Raises:
        InputError: it has no names there.
    """
    loaded = read_checkpoint(path)
    content = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: is no state dict, and has none under 'model'")
    return dict(content)


def first_difference(a: State, b: State) -> tuple[str, object, object] | None:
    """The first name whose tensors have other shapes, with both; "nothing" where one has none."""
    for name in (*a, *b):
        shapes = [tuple(of[name].shape) if name in of else "nothing" for of in (a, b)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None
