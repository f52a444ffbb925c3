"""Classes that are made when a layer is changed in place: what is new is mixed into its class."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn


class MixedIn(nn.Module):
    """What is mixed in.

    Attributes:
        made_name: what the class is called that it makes of another, a format.
        made_from: the name of that class's attribute that is the other.
    """

    made_name: str
    made_from: str


class Mixed(type):
    """The class of such classes, which are pickled by their parts, as no name finds them.

    Attributes:
        parts: what is mixed in, and the class before.
    """

    parts: tuple[type[MixedIn], type[nn.Module]]


_CLASSES: dict[tuple[type, type], type] = {}


def mixed(kind: type[MixedIn], cls: type[nn.Module]) -> type[nn.Module]:
    """A class of layers with something mixed in; always the same for the two."""
    if (kind, cls) not in _CLASSES:
        of_class = {"__doc__": kind.__doc__, "parts": (kind, cls), kind.made_from: cls}
        _CLASSES[kind, cls] = Mixed(kind.made_name.format(cls.__name__), (kind, cls), of_class)
    return _CLASSES[kind, cls]


def _reduced(cls: Mixed) -> str | tuple[Callable[..., Any], tuple]:
    # One that somebody has derived from it has a name.
    return (mixed, cls.parts) if "parts" in vars(cls) else cls.__qualname__


copyreg.pickle(Mixed, _reduced)  # type: ignore[arg-type]  # of a class's class, too
