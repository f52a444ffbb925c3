"""The names of layers in their model, for what processes tell each other and for messages."""

from __future__ import annotations

from torch import nn

from .batch_norm import BatchNorm2d
from .kinds import unwrapped
from .l1_batch_norm import L1BatchNorm2d
from .meeting import check_timeout
from .shuffle import Shuffled, shuffled_methods


def name_layers(model: nn.Module, timeout: float | None = None) -> nn.Module:
    """Tell BatchNorm layers of ours, and what is shuffled, their names in a model.

    By the names, processes find out whether they are in the same layer, and messages say which one
    it is. ``convert_batchnorm``, ``BNHooks`` and the trainers of this package do it; layers that
    are built otherwise go by their kind, and by how many were made before. Two models that one
    process trains by turns, a student and a teacher say, need other names: name the layers of a
    module of both.

    Args:
        timeout: seconds that a process waits for the others, for all layers over processes; None
            for what each has (:class:`BatchNorm2d`).

    Returns:
        the model.

    Raises:
        InputError: timeout is not accepted.
    """
    if timeout is not None:
        check_timeout("timeout", timeout)
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, L1BatchNorm2d):
            module.name = name
        own = [module] if isinstance(module, BatchNorm2d) else []
        exchanging: list[BatchNorm2d | Shuffled] = [*own, *shuffled_methods(module)]
        for layer in exchanging:
            layer.calls.name = name
            layer.timeout = layer.timeout if timeout is None else timeout
    return model
