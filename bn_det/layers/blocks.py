"""What holds for the layers of a model inside a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import choose
from .batch_norm import STATISTICS, BatchNorm2d


@contextmanager
def evaluated_with(module: nn.Module, statistics: str) -> Iterator[None]:
    """Inside the block, what normalizes every BatchNorm of ours in a module in evaluation.

    Args:
        statistics: "population" or "batch".
    """
    choose("statistics", statistics, STATISTICS)
    with _set(_ours(module), eval_statistics=statistics):
        yield


@contextmanager
def trained_with(module: nn.Module, statistics: str) -> Iterator[None]:
    """Inside the block, what normalizes every BatchNorm of ours in a module in training.

    Args:
        statistics: "population" or "batch".
    """
    choose("statistics", statistics, STATISTICS)
    with _set(_ours(module), train_statistics=statistics):
        yield


@contextmanager
def no_population_update(module: nn.Module) -> Iterator[None]:
    """Inside the block, training leaves the population statistics of a module as they are.

    For a pass over other data than those of test time, the generator's step of a GAN for example.
    For every BatchNorm layer, torch's and ours; what normalizes does not change.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # In training mode torch's own layers then normalize by the batch, as before, and in evaluation
    # mode by the buffers that they still have.
    with _set(layers, track_running_stats=False):
        yield


def _ours(module: nn.Module) -> list[BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, BatchNorm2d)]


@contextmanager
def _set(layers: Sequence[nn.Module], **values: Any) -> Iterator[None]:
    """Attributes of layers inside the block."""
    before = [{name: getattr(layer, name) for name in values} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(values)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).update(own)


@contextmanager
def ghost_groups(module: nn.Module, groups: Tensor) -> Iterator[None]:
    """Inside the block every BatchNorm of ours in a module normalizes the groups that are given.

    Wu & Johnson, Sec. 6.3, normalize across classes where a batch has two samples of each: give
    samples 0, 2, 4, ... and 1, 3, 5, ... a group. For training mode; with activation checkpointing
    the backward pass has to be in the block, too.

    Args:
        groups: an integer for each sample of the module's batches, shape (N,).

    Raises:
        ValueError: from the forward pass, if a layer has another number of samples, or normalizes
            over processes.
    """

    def give_groups(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {"groups": groups, **kwargs}

    hooks = [
        # Of nested blocks the inner one is asked first, and what is given stays.
        layer.register_forward_pre_hook(give_groups, prepend=True, with_kwargs=True)
        for layer in module.modules()
        if isinstance(layer, BatchNorm2d)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
