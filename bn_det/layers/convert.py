"""Exchange of the BatchNorm layers of a model that is already built."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .domain_batch_norm import DomainBatchNorm2d
from .sources import SourceBatchNorm2d


def convert_batchnorm(module: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every BatchNorm2d and SyncBatchNorm in a module, in place.

    For what can be built from a norm's name alone, such as Detectron2's ResNet from a config;
    where a callable can be passed instead, pass one. Layers that take a list of domains are left
    alone. Do not convert Detectron2's RetinaNet head built with "BN": its ``CycleBatchNormList``
    depends on the order of calls.

    Args:
        module: the model. A layer that is used in several places is replaced by one layer.
        make: from the number of channels to the new layer, for example :class:`BatchNorm2d`.

    Returns:
        The module itself, or the new layer if the module is a BatchNorm. A new layer holds the old
        one's parameters and buffers (the same objects where both have them registered alike, so
        that optimizers stay valid; in a :class:`SourceBatchNorm2d` copies), eps, momentum and
        training mode. A layer that has neither (LocalResponseNorm) begins anew.

    Raises:
        ValueError: the old layer has parameters or buffers that the new one has no place for, or
            lacks some that the new one needs.
    """
    return _convert(module, make, {})


def _convert(
    module: nn.Module, make: Callable[[int], nn.Module], done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = module
    if isinstance(module, DomainBatchNorm2d):
        return module
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        done[module] = _with_state_of(module, make(module.num_features))
        return done[module]
    # Not named_children: it leaves out the second name of a shared module.
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _convert(child, make, done)
    return module


def _with_state_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a new layer everything that the old one has."""
    if isinstance(new, SourceBatchNorm2d):
        return _with_copies_of(old, new)
    if isinstance(new, nn.LocalResponseNorm):
        return new.train(old.training)
    for name in ("eps", "momentum", "affine", "track_running_stats"):
        if hasattr(new, name):
            setattr(new, name, getattr(old, name))
    for name, value in (*old._parameters.items(), *old._buffers.items()):
        if name in new._parameters and (value is None or name in old._parameters):
            new._parameters[name] = value
        elif name in new._buffers and (value is not None or isinstance(new, nn.BatchNorm2d)):
            is_parameter = isinstance(value, nn.Parameter)
            new._buffers[name] = value.detach() if is_parameter else value
        elif name != "num_batches_tracked" and (value is not None or name in new._buffers):
            raise ValueError(f"{type(new).__name__} cannot hold the {name} of {old}")
    return new.train(old.training)


def _with_copies_of(old: nn.Module, new: SourceBatchNorm2d) -> nn.Module:
    """Give each source of a new layer everything that the old layer has."""
    state = old.state_dict()
    try:
        new.to(next(iter(state.values()))).load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{type(new).__name__} cannot hold the state of {old}: {e}") from e
    for part in (new, *new.children()):
        part.eps, part.momentum = old.eps, old.momentum
    return new.train(old.training)
