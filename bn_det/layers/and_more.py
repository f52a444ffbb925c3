"""Layers that call their children after they normalize, as timm's do, which have an activation."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .become import with_class
from .mixed import MixedIn, mixed

M = TypeVar("M", bound=nn.Module)


class AndMore(MixedIn):
    """Mixed into the class of a layer that has taken the place of such a one.

    Attributes:
        norm_type: the class of what normalizes.
        more: names of the children that follow, in their order; others are what normalizes.
    """

    made_name, made_from = "{}AndMore", "norm_type"
    norm_type: type[nn.Module]
    more: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        for name in self.more:
            y = getattr(self, name)(y)
        return y


def with_more(layer: M, rest: nn.Sequential | None) -> M:
    """Have a layer call others after it normalizes, in place; None for nothing.

    Raises:
        ValueError: one of them has the name of a child of the layer.
    """
    if rest is not None:
        if both := layer._modules.keys() & rest._modules.keys():
            raise ValueError(f"{type(layer).__name__} has a child {sorted(both)[0]!r} of its own")
        layer._modules.update(rest._modules)
        vars(layer)["more"] = tuple(rest._modules)
        with_class(layer, mixed(AndMore, type(layer)))
    return layer
