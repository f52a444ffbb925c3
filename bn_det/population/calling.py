"""How a model is called on a batch of a data loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Call = Callable[[nn.Module, Any], Any]


def called(model: nn.Module, call: Call | None) -> Callable[[Any], Any]:
    """A function of a batch: the one that is given, or the model's.

    By default a model is called as ``model(batch)``, and with a tuple as ``model(*batch)``, if its
    forward method takes as many arguments: (images, targets) of a detector of torchvision.
    """
    return partial(call or _call, model)


def is_iterable(batches: object) -> bool:
    """Whether it can be a data loader: not a text, whose characters would be batches."""
    return not isinstance(batches, str) and any(
        hasattr(batches, of) for of in ("__iter__", "__getitem__")
    )


def _call(model: nn.Module, batch: Any) -> Any:
    args = batch if _are_arguments(model, batch) else (batch,)
    try:
        return model(*args)
    except (AssertionError, AttributeError, TypeError, ValueError) as e:
        if isinstance(batch, (tuple, list)) and hasattr(e, "add_note"):  # Python 3.11
            kind, how = type(batch).__name__, "*batch" if args is batch else "batch"
            e.add_note(
                f"The model was called as model({how}), where a batch is a {kind} of {len(batch)}; "
                "if it takes something else, say so by call=lambda model, batch: ..."
            )
        raise


def _are_arguments(model: nn.Module, batch: Any) -> bool:
    if not isinstance(batch, tuple) or hasattr(batch, "_fields") or len(batch) < 2:
        return False
    try:
        inspect.signature(model.forward).bind(*batch)
    except (TypeError, ValueError):
        return False
    return True
