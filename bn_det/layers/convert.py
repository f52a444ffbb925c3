"""Exchange of the BatchNorm layers of a model that is already built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrize import is_parametrized

from ..errors import InputError, first_of
from .and_more import with_more
from .batch_norm import BatchNorm2d
from .become import become, class_of, with_class
from .domain_batch_norm import DomainBatchNorm2d, M, holders_of_domains
from .folded import has_learned
from .freeze import freeze_statistics, is_frozen, thaw_statistics
from .frozen import FrozenBatchNorm
from .kinds import (
    OF_TORCH,
    STATE,
    STATISTICS,
    follows,
    is_batch_norm,
    is_host_frozen,
    selected,
    unwrapped,
    what_else,
    why_lazy,
)
from .l1_batch_norm import L1BatchNorm2d

logger = logging.getLogger(__name__)

_PARAMETERS = STATE[2:]


def convert_batchnorm(
    module: nn.Module,
    make: Callable[[int], nn.Module],
    modules: str | Iterable[str] | None = None,
) -> nn.Module:
    """Exchange the BatchNorm layers of a model for others, in place.

    For what can be built from a norm's name alone, such as Detectron2's ResNet from a config;
    where a callable can be passed instead, pass one. A layer stays the object that it is, with all
    that has it or belongs to it: its places, hooks, parametrizations, mode, and parameters and
    buffers (the same objects where both have them registered alike, so that optimizers stay valid;
    what a layer has once and the new one for each domain is copied). A layer that takes other
    inputs than images goes on taking them, and one that calls its children after it normalizes
    (timm's, with an activation) goes on calling them. What is frozen (:func:`bn_det.freeze`) stays
    so, and is of the new kind once it is thawed.

    A warning names what is left as it is: layers that otherwise compute more than a BatchNorm;
    those for lists of domains where the new layer takes a tensor, or the reverse; those that have
    not been called yet (lazy). One names what has learned something, and becomes a layer without
    any state. A host's FrozenBatchNorm2d is left, too (:func:`bn_det.thaw`). In Detectron2's
    RetinaNet head built with "BN" the layers of each level are exchanged; its
    ``CycleBatchNormList`` goes by the order of calls, as before.

    Args:
        module: the model, or a layer.
        make: from the number of channels to the new layer, for example :class:`BatchNorm2d`, or
            for SyncBN ``functools.partial(BatchNorm2d, group="world")``. Its ``eps``, ``momentum``,
            ``affine`` and ``track_running_stats`` become those of the old layer.
        modules: names of modules or patterns of names, as in :func:`bn_det.freeze`; None for all.

    Returns:
        the module.

    Raises:
        InputError: what is made is no layer of as many channels, or is frozen.
        ValueError: an old layer has parameters or buffers that the new one has no place for, lacks
            some that the new one needs, or has different ones for domains that share them in the
            new one. Nothing is changed then.
    """
    if not callable(make) or isinstance(make, nn.Module):
        raise InputError(f"convert_batchnorm: make: a {type(make).__name__} is {_NO_MAKE}")
    layers = selected("convert_batchnorm", unwrapped(module), modules)
    of_hosts = [name for layer, name in layers.items() if is_host_frozen(layer)]
    others = {layer: name for layer, name in layers.items() if not is_host_frozen(layer)}
    made: dict[_NormBase, nn.Module] = {}
    left: dict[str, str] = {}
    dropped: dict[str, str] = {}
    returned: set[nn.Module] = set()
    for layer, name in others.items():
        why = why_lazy(layer)
        rest = None if why else follows(layer)
        if not why and rest is None:
            why = what_else(layer)
        if not why:
            new = make(layer.num_features)
            _check_made(new, layer.num_features, returned)
            returned.add(new)
            new = _taking_the_same(layer, new)
            why = _why_other_inputs(layer, new)
        if why:
            left[name or type(layer).__name__] = why
        else:
            new = _with_state_of(layer, new)
            if _has_no_state(new) and has_learned(layer):
                dropped[name or type(layer).__name__] = type(new).__name__
            made[layer] = with_more(new, rest)
    for layer, new in made.items():
        was_frozen, parameters = is_frozen(layer), set(layer.parameters())
        thaw_statistics(layer)  # which has it in the mode that was asked for
        become(layer, new)
        for parameter in parameters - set(layer.parameters()):
            parameter.grad = None  # an optimizer that still has it would go on by its momentum
        if was_frozen and is_batch_norm(layer) and not is_host_frozen(layer):
            freeze_statistics(layer)
    for layer in made:
        if isinstance(layer, BatchNorm2d):
            layer.calls.name = others[layer]
    _tell(of_hosts, left, dropped)
    return module


def _tell(of_hosts: list[str], left: dict[str, str], dropped: dict[str, str]) -> None:
    """Name the layers that are as they were, and those whose content is gone."""
    if of_hosts:  # as most backbones have: no warning
        logger.info("convert_batchnorm has left what is frozen: %s", ", ".join(of_hosts))
    if left:
        named: dict[str, list[str]] = {}
        for name, why in left.items():
            named.setdefault(why, []).append(name)
        reasons = "; ".join(f"{first_of(names)}: {why}" for why, names in named.items())
        logger.warning("convert_batchnorm has left %s", reasons)
    if dropped:
        kinds = "/".join(sorted(set(dropped.values())))
        names = ", ".join(dropped)
        logger.warning("%s has no place for what has been learned in %s", kinds, names)


_NO_MAKE = (
    "not accepted; use a function from the number of channels to a layer, for example "
    "bn_det.BatchNorm2d or functools.partial(bn_det.BatchNorm2d, group='world')"
)


def _check_made(new: object, num_features: int, before: Container[object]) -> None:
    """Raise InputError for what no BatchNorm can become, or another one becomes already."""
    kind = type(new).__name__
    if isinstance(new, FrozenBatchNorm):
        raise InputError(f"convert_batchnorm: make: {kind} is not accepted; use bn_det.freeze")
    if not isinstance(new, nn.Module):
        raise InputError(f"convert_batchnorm: make: {kind}, which it has made, is {_NO_MAKE}")
    if new in before:
        raise InputError(
            f"convert_batchnorm: make: one {kind} for several layers is not accepted; make a new "
            "one each time"
        )
    made = getattr(new, "num_features", num_features)
    if made != num_features:
        raise InputError(
            f"convert_batchnorm: make: a {kind} of {made} channels is not accepted for one of "
            f"{num_features}"
        )


def as_ours(layer: _NormBase) -> BatchNorm2d:
    """A layer of ours with all that one of torch's has; the same function in either mode."""
    group = None
    if isinstance(layer, nn.SyncBatchNorm):
        group = layer.process_group or "world"
    new = BatchNorm2d(layer.num_features, group=group)
    new.takes = takes(layer)
    return _with_state_of(layer, new)


def takes(layer: nn.Module) -> type[_BatchNorm]:
    """The layer of torch whose shapes of input a layer takes; SyncBatchNorm's are any."""
    # A SyncBatchNorm does not tell what it has been made of, unless it has been made here.
    if (noted := vars(layer).get("takes")) is not None:
        return noted
    cls = layer.thawed_type if isinstance(layer, FrozenBatchNorm) else class_of(layer)
    return next(of_torch for of_torch in OF_TORCH if issubclass(cls, of_torch))


def _taking_the_same(old: _NormBase, new: nn.Module) -> nn.Module:
    """The new layer, or one that takes what the old one does."""
    wanted = takes(old)
    if type(new) in OF_TORCH[:3] and wanted is nn.SyncBatchNorm:
        new = BatchNorm2d(old.num_features)  # none of torch's takes any input
    elif type(new) in OF_TORCH[:3]:
        with_class(new, wanted)
    if isinstance(new, (BatchNorm2d, nn.SyncBatchNorm)):
        new.takes = wanted
    return new


def _why_other_inputs(old: nn.Module, new: nn.Module) -> str:
    """Why a new layer cannot be called as the old one is; "" if it can."""
    if _takes_list(old) != _takes_list(new):
        kinds = ["a tensor", "a list of domains"]
        old_takes, new_takes = kinds[_takes_list(old)], kinds[_takes_list(new)]
        return f"it takes {old_takes}, and a {type(new).__name__} {new_takes}"
    images_only = isinstance(new, (DomainBatchNorm2d, L1BatchNorm2d)) or is_host_frozen(new)
    if images_only and takes(old) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"it takes what a {takes(old).__name__} does, and a {type(new).__name__} images"
    return ""


def _takes_list(layer: nn.Module) -> bool:
    return isinstance(layer, DomainBatchNorm2d) and layer.takes_list


def _with_state_of(old: nn.Module, new: M) -> M:
    """Give a new layer everything that the old one has; the old one is as before."""
    if _has_no_state(new):
        return new
    for holder in _holders(new):
        holder.eps = old.eps
        if hasattr(holder, "momentum"):
            holder.momentum = old.momentum
    _set_flags(old, new)
    filled: dict[tuple[nn.Module, str], Tensor | None] = {}
    used: set[int] = set()
    for source, target, name in _pairs(old, new):
        value = getattr(source, name)
        key = target, name
        if key in filled:
            if not _is_same(filled[key], value):
                raise ValueError(
                    f"{type(new).__name__} cannot hold the {name} of a {_name(old)}: domains "
                    "that share it there have different ones"
                )
            continue
        filled[key] = value
        if name in _PARAMETERS and is_parametrized(source, name):
            _leave_parametrized(old, new, target, name)
        else:
            _put(old, new, target, name, _own(value, used))
    return new.train(getattr(old, "asked_mode", old.training))


def _set_flags(old: nn.Module, new: nn.Module) -> None:
    """Say of each holder of a state what it holds, which a layer of domains may do or not."""
    olds, news = holders_of_domains(old), holders_of_domains(new)
    for k, (population, affine) in enumerate(news):
        of_old, affine_of_old = olds[k % len(olds)]
        if hasattr(population, "track_running_stats"):
            tracks = getattr(of_old, "track_running_stats", of_old.running_mean is not None)
            population.track_running_stats = tracks
        if hasattr(affine, "affine"):
            affine.affine = getattr(affine_of_old, "affine", affine_of_old.weight is not None)


def _has_no_state(new: nn.Module) -> bool:
    """As LocalResponseNorm has none."""
    return not is_batch_norm(new) and not new.state_dict()


def _name(layer: nn.Module) -> str:
    return class_of(layer).__name__


def _holders(layer: nn.Module) -> Iterator[nn.Module]:
    yield layer
    if isinstance(layer, DomainBatchNorm2d):
        yield from layer.children()


def _pairs(old: nn.Module, new: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """Every place in a new layer, what fills it, and the name of the tensor, domain by domain."""
    olds, news = holders_of_domains(old), holders_of_domains(new)
    number = max(len(olds), len(news))
    if min(len(olds), len(news)) not in (1, number):
        raise ValueError(
            f"{type(new).__name__} of {len(news)} domains cannot hold the state of a {_name(old)}"
        )
    for k in range(number):
        (of_old, affine_of_old), (of_new, affine_of_new) = olds[k % len(olds)], news[k % len(news)]
        for name in STATISTICS:
            if hasattr(of_new, name) or getattr(of_old, name, None) is not None:
                yield of_old, of_new, name
        for name in _PARAMETERS:
            yield affine_of_old, affine_of_new, name


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _own(value: Tensor | None, used: set[int]) -> Tensor | None:
    """A tensor, or a copy of it where it has been given away already."""
    if value is None or id(value) not in used:
        used.add(id(value))
        return value
    copy = value.detach().clone()
    return nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy


def _put(
    old: nn.Module, new: nn.Module, target: nn.Module, name: str, value: Tensor | None
) -> None:
    parameters: dict[str, Any] = target._parameters
    if name in parameters:
        parameters[name] = value
    elif name in target._buffers and (value is not None or isinstance(target, _BatchNorm)):
        target._buffers[name] = value.detach() if isinstance(value, nn.Parameter) else value
    elif name != "num_batches_tracked" and (value is not None or name in target._buffers):
        raise ValueError(f"{type(new).__name__} cannot hold the {name} of a {_name(old)}")


def _leave_parametrized(old: nn.Module, new: nn.Module, target: nn.Module, name: str) -> None:
    """Make room for a parameter that stays with the parametrizations of the old layer."""
    if target is not new or name not in new._parameters:
        raise ValueError(
            f"{type(new).__name__} cannot hold the parametrized {name} of a {_name(old)}"
        )
    del new._parameters[name]
