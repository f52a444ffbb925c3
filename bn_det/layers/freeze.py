"""BatchNorm that is final, for further training, and that learns again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import InputError
from .and_more import AndMore
from .batch_norm import BatchNorm2d
from .become import become, class_of, with_class
from .domain_batch_norm import DomainBatchNorm2d, state_holders
from .folded import has_trivial_statistics
from .frozen import FrozenBatchNorm, StaysInEvaluation
from .held import HeldParameter
from .kinds import (
    STATE,
    eps_of,
    is_host_frozen,
    lists_with_affine,
    selected,
    unwrapped,
    what_else,
    why_lazy,
)
from .mixed import mixed
from .types import AnyBatchNorm, HostFrozen

logger = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=nn.Module)

Modules = str | Iterable[str] | None
"""Names of modules or patterns of names; None for all."""


def freeze(
    model: nn.Module,
    modules: Modules = None,
    *,
    statistics: bool = True,
    affine: bool = True,
) -> nn.Module:
    """Have BatchNorm layers normalize by their population statistics, in training, too.

    In place and for good, as Detectron2's FrozenBatchNorm2d: nothing updates the statistics any
    more, whatever mode the model is put into, and whatever converts it. The layers are the objects
    that they were, with their hooks, parametrizations and places; :func:`thaw` undoes it. A layer
    becomes a :class:`FrozenBatchNorm`; one that may do more than normalize (timm's, with an
    activation) stays in evaluation mode; ours that do, or are for several domains, know that they
    are frozen.

    Weight and bias need no gradient then, and lose the one that they have: an optimizer that holds
    them leaves them as they are, to the bit. Where the model is a DistributedDataParallel, which
    waits for every gradient that it was built for, they go on having one, and it is dropped before
    each step of an optimizer of torch.

    With ``affine=False`` it warns of layers with mean 0 and variance 1: a checkpoint has them where
    statistics have been folded into weight and bias, as in the published ResNets of Caffe. These
    then learn otherwise than those of the model before folding. A model that has never been trained
    has such statistics, too, and gets the same warning.

    Args:
        modules: names of modules, or patterns of names (``"backbone.layer[12]*"``): what is in
            them is frozen. None for all.
        statistics: whether the statistics are frozen.
        affine: whether weight and bias are.

    Returns:
        the model.

    Raises:
        InputError: a layer cannot be frozen, as it has no population statistics or has not been
            called yet; or ``modules`` names nothing. Nothing is changed then.
    """
    _check_choice("freeze", statistics, affine)
    layers = check_freezing(model, modules, statistics)
    for layer in layers:
        if statistics:
            freeze_statistics(layer)
    if affine:
        _freeze_affine(model, layers)
    else:
        warn_of_folded_statistics(unwrapped(model), layers)
    return model


def thaw(
    model: nn.Module,
    modules: Modules = None,
    *,
    statistics: bool = True,
    affine: bool = True,
) -> nn.Module:
    """Undo :func:`freeze`: have BatchNorm layers update their statistics, and learn.

    In place. A FrozenBatchNorm2d of Detectron2 or torchvision becomes a :class:`BatchNorm2d` with
    the same function in evaluation, whose weight and bias are new parameters: give them to the
    optimizer (``optimizer.add_param_group``) where there is one already. The parameters of what
    :func:`freeze` has frozen are the ones that it had.

    Args:
        modules: as in :func:`freeze`.
        statistics: whether the statistics move again.
        affine: whether weight and bias learn again.

    Returns:
        the model.

    Raises:
        InputError: ``modules`` names nothing, or ``affine`` alone is asked of a host's layer.
    """
    _check_choice("thaw", statistics, affine)
    layers = selected("thaw", unwrapped(model), modules)
    for layer, name in layers.items():
        if is_host_frozen(layer) and (what := _why_not_thawed(layer, statistics)):
            raise InputError(f"thaw: {name or type(layer).__name__}: {what}")
    new = []
    for layer, name in layers.items():
        if is_host_frozen(layer):
            become(layer, _learning(layer, affine))
            new += [f"{name}.weight", f"{name}.bias"] if affine else []
        elif statistics:
            thaw_statistics(layer)
    for parameter in affine_of(unwrapped(model), layers) if affine else ():
        parameter.requires_grad_(True)
        if type(parameter) is HeldParameter:
            _let_go(parameter)
    if new:
        logger.info("Parameters that no optimizer has yet: %s", ", ".join(new))
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether a BatchNorm normalizes by statistics that nothing updates, whatever its mode."""
    if isinstance(layer, (FrozenBatchNorm, StaysInEvaluation)):
        return True
    return layer.frozen if isinstance(layer, BatchNorm2d) else is_host_frozen(layer)


def _check_choice(what: str, statistics: bool, affine: bool) -> None:
    if not (statistics or affine):
        raise InputError(f"{what}: statistics False and affine False leave nothing to do")


def check_freezing(
    model: nn.Module, modules: Modules = None, statistics: bool = True
) -> dict[AnyBatchNorm, str]:
    """The layers that :func:`freeze` would freeze, with their names; raises what it would."""
    layers = selected("freeze", unwrapped(model), modules)
    for layer, name in layers.items():
        why = why_lazy(layer)
        if statistics and not why and any(p.running_mean is None for p, _ in state_holders(layer)):
            why = "it has no population statistics (track_running_stats False) to normalize by"
        if why:
            raise InputError(f"freeze: {name or type(layer).__name__} cannot be frozen: {why}")
    return layers


def freeze_statistics(layer: AnyBatchNorm) -> None:
    """Freeze those of a layer that has some."""
    if is_frozen(layer):
        return
    if isinstance(layer, BatchNorm2d) and isinstance(layer, (DomainBatchNorm2d, AndMore)):
        _set_frozen(layer, True)
    elif what_else(layer):
        with_class(layer, mixed(StaysInEvaluation, class_of(layer)))
        layer.train(layer.training)  # which notes the mode, and evaluates
    else:
        vars(layer)["thawed_type"] = class_of(layer)
        with_class(layer, FrozenBatchNorm)


def thaw_statistics(layer: nn.Module) -> None:
    """Thaw those of a layer that :func:`freeze` has frozen."""
    if isinstance(layer, FrozenBatchNorm):
        with_class(layer, vars(layer).pop("thawed_type", layer.thawed_type))
    elif isinstance(layer, StaysInEvaluation):
        with_class(layer, layer.thawed_type)
        layer.train(vars(layer).pop("asked_mode"))
    elif isinstance(layer, BatchNorm2d):
        _set_frozen(layer, False)


def _set_frozen(layer: BatchNorm2d, frozen: bool) -> None:
    for part in layer.modules():
        if isinstance(part, BatchNorm2d):
            part.frozen = frozen


def _why_not_thawed(layer: nn.Module, statistics: bool) -> str:
    if not statistics:
        return f"a {type(layer).__name__} has no parameters; thaw its statistics, too"
    return what_else(layer)


@torch.no_grad()
def _learning(layer: HostFrozen, affine: bool) -> BatchNorm2d:
    """A layer with the function of a host's FrozenBatchNorm2d."""
    weight = layer.weight
    new = BatchNorm2d(len(weight), eps_of(layer), device=weight.device, dtype=weight.dtype)
    for name in STATE:
        getattr(new, name).copy_(getattr(layer, name))
    return new.requires_grad_(affine)


def affines_of(model: nn.Module, layers: Iterable[Layer]) -> dict[Layer, list[nn.Parameter]]:
    """The parameters of each layer, with those that its parent has for it.

    Detectron2's CycleBatchNormList has weight and bias for BatchNorm layers that have none.
    """
    lists = lists_with_affine(model)
    holders = {layer: (layer, lists[layer]) if layer in lists else (layer,) for layer in layers}
    return {layer: [p for of in held for p in of.parameters()] for layer, held in holders.items()}


def affine_of(model: nn.Module, layers: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    """Those of all layers, each once."""
    return dict.fromkeys(chain.from_iterable(affines_of(model, layers).values()))


def learns(parameter: Tensor) -> bool:
    """Whether optimizers move a parameter."""
    return parameter.requires_grad and type(parameter) is not HeldParameter


def _freeze_affine(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    awaited = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    for parameter in affine_of(unwrapped(model), layers):
        parameter.grad = None  # momentum would go on by it
        if not (id(parameter) in awaited and parameter.requires_grad):
            parameter.requires_grad_(False)
        elif type(parameter) is not HeldParameter:
            _hold(parameter)


def _hold(parameter: nn.Parameter) -> None:
    hook = parameter.register_hook(torch.zeros_like)
    vars(parameter)["hook"] = hook
    parameter.__class__ = HeldParameter
    _watch_optimizers()


def _let_go(parameter: nn.Parameter) -> None:
    vars(parameter).pop("hook").remove()
    parameter.__class__ = nn.Parameter


_WATCHED: list[object] = []


def _watch_optimizers() -> None:
    """Have every optimizer of torch drop the gradients of parameters that are held."""
    if not _WATCHED:
        _WATCHED.append(register_optimizer_step_pre_hook(_drop_gradients))


def _drop_gradients(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    held = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if type(parameter) is HeldParameter
    ]

    def drop(value: Any = None) -> Any:
        for parameter in held:
            parameter.grad = None
        return value

    drop()
    if not held:
        return args, kwargs
    # The gradients of a step with a closure come in it.
    args = tuple([_then(drop, arg) if callable(arg) else arg for arg in args])
    return args, {k: _then(drop, v) if callable(v) else v for k, v in kwargs.items()}


def _then(after: Callable[[Any], Any], closure: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: after(closure())


def warn_of_folded_statistics(model: nn.Module, layers: dict[AnyBatchNorm, str]) -> None:
    """Warn of layers whose weight and bias are to be trained, but with statistics folded into them.

    With scale a = weight / std and shift b = bias - mean * a the layer computes a x + b. A step of
    SGD on a and b is not one on weight and bias: it lacks the factor 1 / var in a, for example.
    """
    affines = affines_of(model, layers)
    names = [
        name or type(layer).__name__
        for layer, name in layers.items()
        if has_trivial_statistics(layer) and any(map(learns, affines[layer]))
    ]
    if names:
        logger.warning(
            "Frozen BatchNorm with mean 0 and variance 1: %s. Where statistics have been folded "
            "into weight and bias, these have other gradients than before and learn otherwise; "
            "freeze them, too, unless the model has not been trained before",
            ", ".join(names),
        )
