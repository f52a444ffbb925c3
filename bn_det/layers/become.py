"""A layer that becomes another one in its place: the object stays, and so does all that has it.

A parent, a plain list, another parent that shares it; hooks; and what has been parametrized. Lazy
modules and parametrizations of torch change the class of a module in the same way.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_OF_A_LAYER = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
OF_ANY_MODULE = set(vars(nn.Module())) - set(_OF_A_LAYER)
"""Its mode, and its hooks of all kinds."""


def with_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a layer, and keep all that is in it."""
    layer.__class__ = _parametrized(layer, cls)


def become(layer: nn.Module, new: nn.Module) -> None:
    """Give a layer the class and the content of another one, and keep its hooks and its mode.

    Args:
        new: is of no use afterwards. Where the layer's parameter is parametrized it has none of
            that name.
    """
    cls = _parametrized(layer, type(new))
    parametrizations = layer._modules.get("parametrizations")
    kept = {name: value for name, value in vars(layer).items() if name in OF_ANY_MODULE}
    content: dict[str, Any] = {**vars(new), **kept}
    vars(layer).clear()
    vars(layer).update(content)
    layer.__class__ = cls
    if parametrizations is not None:
        layer._modules["parametrizations"] = parametrizations


def class_of(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, below those that torch's parametrizations and tuning have put on it."""
    cls = type(layer).__mro__[1] if is_parametrized(layer) else type(layer)
    return getattr(cls, "tuned_type", cls)


def _parametrized(layer: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """A class like another one, with the properties that a layer's parametrizations have made."""
    if not is_parametrized(layer):
        return cls
    of_torch = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{cls.__name__}", (cls,), of_torch)
