"""What kind of BatchNorm a module is, whoever wrote it, and which of a model's are meant."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import InputError, first_of, nearest, of_other_type
from .and_more import AndMore
from .batch_norm import BatchNorm2d
from .become import class_of
from .domain_batch_norm import DomainBatchNorm2d
from .frozen import FrozenBatchNorm
from .l1_batch_norm import L1BatchNorm2d
from .types import AnyBatchNorm, HostFrozen, WithAffine

if TYPE_CHECKING:
    from typing_extensions import TypeIs

logger = logging.getLogger(__name__)

STATE = ("running_mean", "running_var", "weight", "bias")
"""What normalizes in evaluation."""

STATISTICS = (*STATE[:2], "num_batches_tracked")
"""What training updates."""

OF_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FORWARDS_OF_TORCH = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""Torch's own layers, the last for any number of dimensions, and their forward methods."""

_KNOWN = (*OF_TORCH, BatchNorm2d, L1BatchNorm2d, FrozenBatchNorm)
"""Those of a tensor that are known to normalize, and to do nothing else."""


def evaluates_by_batch(layer: nn.Module) -> bool:
    """Whether a layer normalizes by batch statistics in evaluation, though it has others."""
    is_ours = isinstance(layer, BatchNorm2d)
    return is_ours and layer.eval_statistics == "batch" and not layer.frozen


def check_module(key: str, module: object) -> None:
    """Raise InputError for an argument that is no module."""
    if not isinstance(module, nn.Module):
        raise of_other_type(key, module, "a torch.nn.Module")


def unwrapped(model: nn.Module) -> nn.Module:
    """Without what compiles it or shares its gradients, which would see every pass.

    Raises:
        InputError: it is no module.
    """
    check_module("model", model)
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def refuse_meta(what: str, model: nn.Module) -> None:
    """Raise InputError for a model of which something has no value.

    Args:
        what: begins the message.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise InputError(
            f"{what}: on the meta device, where nothing has a value: {first_of(empty)}; load its "
            "weights (load_state_dict(..., assign=True))"
        )


def is_batch_norm(module: nn.Module | None) -> TypeIs[AnyBatchNorm]:
    """Whether a module is a BatchNorm: torch's, ours, frozen by either host, or of a kind of it."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm)) or is_host_frozen(module)


def is_host_frozen(module: nn.Module | None) -> TypeIs[HostFrozen]:
    """Whether a module seems to be a host's FrozenBatchNorm2d, which this room does not import.

    By what it has: a BatchNorm's state, all of it buffers. timm's FrozenBatchNormAct2d has it, too;
    :func:`what_else` looks at what a layer computes.
    """
    if module is None or isinstance(module, (_BatchNorm, FrozenBatchNorm, torch.jit.ScriptModule)):
        return False
    return all(module._buffers.get(name) is not None for name in STATE)


def batch_norms(model: nn.Module) -> dict[AnyBatchNorm, str]:
    """Every BatchNorm that is called, with its name: not those that hold what is a domain's."""
    names = {m: name for name, m in model.named_modules() if is_batch_norm(m)}
    domains = [m for m in names if isinstance(m, DomainBatchNorm2d)]
    held: set[nn.Module] = {part for layer in domains for part in layer.children()}
    return {layer: name for layer, name in names.items() if layer not in held}


def uses_in(model: nn.Module) -> Counter[int]:
    """How many places of a model have a module, and how many a tensor, by :func:`key_of`."""
    every = list(model.modules())
    tensors = (t for m in every for t in (*m._parameters.values(), *m._buffers.values()))
    held = chain(chain.from_iterable(m._modules.values() for m in every), tensors)
    return Counter(key_of(of) for of in held if of is not None)


def key_of(held: nn.Module | Tensor) -> int:
    """The same for all that is one module, or one tensor's memory, by where this begins."""
    if isinstance(held, Tensor) and not is_lazy(held) and held.device.type != "meta":
        return held.data_ptr() or id(held)
    return id(held)


def eps_of(layer: nn.Module) -> float:
    """Of a BatchNorm; next to nothing for a frozen one that has none (maskrcnn-benchmark's).

    Torch accepts no 0 in training.
    """
    return getattr(layer, "eps", 1e-12)


def lists_with_affine(model: nn.Module) -> dict[nn.Module, WithAffine]:
    """The layers whose weight and bias their parent has, for all that are in it; with that one.

    Those of Detectron2's CycleBatchNormList.
    """
    lists = [module for module in model.modules() if _is_list_with_affine(module)]
    return {layer: parent for parent in lists for layer in parent.children()}


def _is_list_with_affine(module: nn.Module) -> TypeGuard[WithAffine]:
    own = [p for p in module._parameters.values() if p is not None]
    kinds = (_BatchNorm, FrozenBatchNorm)
    return module._parameters.keys() == {"weight", "bias"} and all(
        isinstance(m, kinds) and m.weight is None and all(p.shape == (m.num_features,) for p in own)
        for m in module._modules.values()
    )


def selected(
    what: str, model: nn.Module, modules: str | Iterable[str] | None
) -> dict[AnyBatchNorm, str]:
    """The BatchNorm layers of some sub-trees of a model, with their names.

    Args:
        what: begins messages.
        modules: names of modules, or patterns of names as a shell has them (``"layer[34]*"``); each
            stands for all that is in the modules it names. None for the whole model.

    Raises:
        InputError: they are no names; a name or pattern has no BatchNorm in it.
    """
    layers = batch_norms(model)
    if modules is None:
        if not layers:
            logger.warning("%s: the model has no BatchNorm", what)
        return layers
    are_names = isinstance(modules, Iterable) and not isinstance(modules, nn.Module)
    if not (are_names and modules and all(isinstance(m, str) for m in modules)):
        raise InputError(
            f"{what}: modules: {shown_type(modules)} is not accepted; use names of modules or "
            "patterns of them, or None for all; a module itself is the first argument"
        )
    patterns = [modules] if isinstance(modules, str) else list(modules)
    found: dict[AnyBatchNorm, str] = {}
    for pattern in patterns:
        of_pattern = {layer: name for layer, name in layers.items() if _is_in(name, pattern)}
        if not of_pattern:
            known = {name for name, _ in model.named_modules() if name}
            why = f"there is no BatchNorm in {pattern!r}"
            raise InputError(f"{what}: {why}" + ("" if pattern in known else _near(pattern, known)))
        found.update(of_pattern)
    return {layer: name for layer, name in layers.items() if layer in found}


def shown_type(value: object) -> str:
    """A value for a message: itself if it is short, or what it is."""
    return (
        repr(value)
        if isinstance(value, (str, tuple, list)) and not value
        else (f"a {type(value).__name__}")
    )


def _near(pattern: str, known: set[str]) -> str:
    return f", and no module of that name; {nearest(pattern, known)}"


def _is_in(name: str, pattern: str) -> bool:
    """Whether a module, or one that it is in, has a name that fits."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:k]), pattern) for k in range(1, len(parts) + 1))


def why_lazy(layer: nn.Module) -> str:
    """Why nothing can be done with a layer yet, if it has not seen its first input."""
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    is_any = any(tensor is not None and is_lazy(tensor) for tensor in tensors)
    return "it has not been called yet (lazy)" if is_any else ""


def what_else(layer: nn.Module) -> str:
    """Why a layer cannot be exchanged by what it computes, whatever its class is; "" if it can.

    Not where its class is known. A copy with a state in which everything matters is compared with
    the formula.
    """
    if "forward" not in vars(layer) and _is_known(class_of(layer)):
        return ""
    if _normalizes(layer, children=False):
        return ""
    return f"a {type(layer).__name__} does not only normalize"


def follows(layer: nn.Module) -> nn.Sequential | None:
    """The children of a layer that does more than normalize, if to call them in their order is all.

    So timm's BatchNormAct2d has an activation. It is tried out, as by :func:`what_else`.
    """
    if isinstance(layer, AndMore):
        is_known = "forward" not in vars(layer) and _is_known(layer.norm_type)
        return _in_order(layer, layer.more) if is_known else None
    if not (what_else(layer) and layer._modules and _normalizes(layer, children=True)):
        return None
    return _in_order(layer, layer._modules)


def _is_known(cls: type[nn.Module]) -> bool:
    """Whether layers of a class are known to normalize, and to do nothing else."""
    if issubclass(cls, AndMore):
        return False
    return issubclass(cls, DomainBatchNorm2d) or cls in _KNOWN


def _in_order(layer: nn.Module, names: Iterable[str]) -> nn.Sequential:
    children = ((name, layer._modules[name]) for name in names)
    return nn.Sequential(OrderedDict((name, of) for name, of in children if of is not None))


@torch.no_grad()
def _normalizes(layer: nn.Module, children: bool) -> bool:
    """Whether that is all that a layer computes.

    Args:
        children: whether its children follow.
    """
    parameters = inspect.signature(class_of(layer).forward).parameters
    if "forward" in vars(layer) or len(parameters) > 2:
        return False  # or otherwise than its class says; or it takes more than an input
    layer = copy.deepcopy(layer).eval()
    state = [getattr(layer, name) for name in STATE]
    for tensor, value in zip(state, (0.5, 1e-4, -1.5, 0.25), strict=True):
        if tensor is not None:
            tensor.fill_(value)
    if state[0] is None:
        return False  # that it can be tried out
    x = _probe(layer, state[0])
    mean, var, weight, bias = state
    expected = F.batch_norm(x, mean, var, weight, bias, eps=eps_of(layer))
    try:
        y = layer.forward(x)  # without its hooks
        expected = _in_order(layer, layer._modules)(expected) if children else expected
    except Exception:  # whatever it wants to be called with
        return False
    # 1 % for half precision; an eps that is left out would be 5 %.
    same = isinstance(y, Tensor) and y.shape == x.shape
    return same and torch.allclose(y, expected, rtol=0.01, atol=0.01)


def _probe(layer: nn.Module, mean: Tensor) -> Tensor:
    """An input of a layer's number of dimensions, with values on both sides of the mean."""
    x = torch.linspace(-3, 3, 4 * len(mean), dtype=mean.dtype, device=mean.device)
    num_dims = {nn.BatchNorm1d: 3, nn.BatchNorm3d: 5}
    dims = next((n for cls, n in num_dims.items() if isinstance(layer, cls)), 4)
    return x.view(2, len(mean), 2, *[1] * (dims - 3))
