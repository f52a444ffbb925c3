"""What holds for the layers of a model inside a block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError, choose
from .batch_norm import STATISTICS, BatchNorm2d
from .become import OF_ANY_MODULE, become, class_of
from .convert import as_ours
from .freeze import is_frozen
from .kinds import FORWARDS_OF_TORCH, batch_norms, check_module, why_lazy
from .kinds import STATISTICS as BUFFERS
from .l1_batch_norm import L1BatchNorm2d


@contextmanager
def evaluated_with(module: nn.Module, statistics: str) -> Iterator[None]:
    """Inside the block, what normalizes the BatchNorm layers of a module in evaluation.

    torch's own are ours as long as the block lasts; frozen ones stay as they are.

    Args:
        statistics: "population" or "batch".

    Raises:
        InputError: a layer cannot be told: one whose class has a forward method of its own.
    """
    choose("statistics", statistics, STATISTICS)
    told = _told("evaluated_with", module, statistics, "population")
    with told, _set(_ours(module), eval_statistics=statistics):
        yield


@contextmanager
def trained_with(module: nn.Module, statistics: str) -> Iterator[None]:
    """Inside the block, what normalizes the BatchNorm layers of a module in training.

    As :func:`evaluated_with`.
    """
    choose("statistics", statistics, STATISTICS)
    told = _told("trained_with", module, statistics, "batch")
    with told, _set(_ours(module), train_statistics=statistics):
        yield


@contextmanager
def no_population_update(module: nn.Module) -> Iterator[None]:
    """Inside the block, training leaves the population statistics of a module as they are.

    For a pass over other data than those of test time, the generator's step of a GAN for example.
    For every BatchNorm layer, torch's and ours; what normalizes does not change.
    """
    check_module("module", module)
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    # In training mode torch's own layers then normalize by the batch, as before, and in evaluation
    # mode by the buffers that they still have.
    known = (BatchNorm2d, L1BatchNorm2d)
    others = [
        m
        for m in layers
        if not isinstance(m, known) and class_of(m).forward not in FORWARDS_OF_TORCH
    ]
    ours = [m for m in layers if m not in others]
    with _set(ours, track_running_stats=False), _other_statistics(others):
        yield


@contextmanager
def _other_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Copies in place of the statistics of layers that may move them whatever they are told.

    Detectron2's NaiveSyncBatchNorm does.
    """
    before = [(m._buffers, {n: m._buffers.get(n) for n in BUFFERS}) for m in layers]
    try:
        for buffers, own in before:
            buffers.update({n: b.clone() for n, b in own.items() if b is not None})
        yield
    finally:
        for buffers, own in before:
            buffers.update({n: b for n, b in own.items() if b is not None})


def _ours(module: nn.Module) -> list[BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, BatchNorm2d)]


@contextmanager
def _told(what: str, module: nn.Module, statistics: str, default: str) -> Iterator[None]:
    """Inside the block, torch's own layers can be told what normalizes: they are ours.

    Args:
        default: what normalizes them by itself; nothing need be told then.
    """
    check_module("module", module)
    others = {
        layer: name
        for layer, name in batch_norms(module).items()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNorm2d)
        if not is_frozen(layer) and statistics != default
    }
    for layer, name in others.items():
        if why := why_lazy(layer):
            raise InputError(f"{what}: {name or 'the module'}: {why}")
        if class_of(layer).forward not in FORWARDS_OF_TORCH:
            raise InputError(
                f"{what}: {name or 'the module'} is a {class_of(layer).__name__}, which cannot be "
                f"told to normalize by {statistics!r}; use convert_batchnorm first"
            )
    before = [(layer, type(layer), dict(vars(layer))) for layer in others]
    try:
        for layer in others:
            become(layer, as_ours(layer))
        yield
    finally:
        for layer, cls, content in before:
            _take_back(layer, cls, content)


def _take_back(layer: nn.Module, cls: type[nn.Module], content: dict[str, Any]) -> None:
    """Give a layer its class back, with the tensors, hooks and mode that it has now."""
    for name in ("_parameters", "_buffers"):
        content[name].update(vars(layer)[name])
    content |= {name: value for name, value in vars(layer).items() if name in OF_ANY_MODULE}
    content |= {name: getattr(layer, name) for name in ("eps", "momentum")}
    vars(layer).clear()
    vars(layer).update(content)
    layer.__class__ = cls


class _ForNow:
    """Mixed into a value of an attribute: what is copied or pickled has the one before."""

    before: bool | str

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.before, memo)  # of a block in a block it is one, too

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return _itself, (self.before,)


class _Flag(_ForNow, int):
    pass


class _Choice(_ForNow, str):
    pass


def _itself(value: Any) -> Any:
    return value


def _for_now(value: bool | str, before: bool | str) -> _ForNow:
    inside = _Choice(value) if isinstance(value, str) else _Flag(value)
    inside.before = before
    return inside


@contextmanager
def _set(layers: Sequence[nn.Module], **values: bool | str) -> Iterator[None]:
    """Attributes of layers inside the block; not of copies that are made there."""
    before = [{name: getattr(layer, name) for name in values} for layer in layers]
    try:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).update({name: _for_now(v, own[name]) for name, v in values.items()})
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

    check_module("module", module)

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
