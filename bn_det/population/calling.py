"""How a model is called on a batch of a data loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

Call = Callable[[nn.Module, Any], Any]


def called(model: nn.Module, call: Call | None) -> Callable[[Any], Any]:
    """A function of a batch: the one that is given, or the model's.

    By default a model is called as ``model(batch)``. A tuple is several arguments where the forward
    method needs as many; also where it takes as many and not all of them are tensors, as (images,
    targets) of a detector of torchvision: a tuple of tensors may as well be one argument, such as
    the levels of a pyramid.
    """
    return partial(call or _call, model)


ITERABLE = "a data loader, or a list of batches"


def is_iterable(batches: object) -> bool:
    """Whether it can be a data loader: not a text, whose characters would be batches."""
    return not isinstance(batches, str) and any(
        hasattr(batches, of) for of in ("__iter__", "__getitem__")
    )


def _call(model: nn.Module, batch: Any) -> Any:
    args = batch if _are_arguments(model, batch) else (batch,)
    try:
        return model(*args)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as e:
        if isinstance(batch, (tuple, list, dict)) and hasattr(e, "add_note"):  # Python 3.11
            e.add_note(_how_called(model, batch, "*batch" if args is batch else "batch"))
        raise


def _how_called(model: nn.Module, batch: tuple | list | dict, how: str) -> str:
    """How a model that has failed was called, what it takes, and what may have been meant."""
    forward = inspect.signature(model.forward)
    said = (
        f"The model was called as model({how}), where a batch is a {type(batch).__name__} of "
        f"{len(batch)}, and its forward method takes {_shown(forward)}"
    )
    stars, args, kwargs = ("**", (), batch) if isinstance(batch, dict) else ("*", batch, {})
    if how == "batch" and len(batch) > 1 and _binds(forward, args, kwargs):
        call = f"call=lambda model, batch: model({stars}batch)"
        return f"{said}; if a batch is these, say so by {call}"
    return f"{said}; if a batch is something else, say so by call=lambda model, batch: ..."


def _shown(forward: inspect.Signature) -> str:
    """Arguments with their defaults, without their types."""
    bare = [of.replace(annotation=of.empty) for of in forward.parameters.values()]
    return str(inspect.Signature(bare))


def _are_arguments(model: nn.Module, batch: Any) -> bool:
    if not isinstance(batch, tuple) or hasattr(batch, "_fields") or len(batch) < 2:
        return False
    forward = inspect.signature(model.forward)
    takes_one = _binds(forward, (batch,), {}) and all(map(torch.is_tensor, batch))
    return _binds(forward, batch, {}) and not takes_one


def _binds(forward: inspect.Signature, args: Sequence, kwargs: Mapping[str, Any]) -> bool:
    try:
        forward.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
