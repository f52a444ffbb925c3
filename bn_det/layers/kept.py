"""What a model's own train() keeps in evaluation mode: as good as frozen, though nothing says so.

Backbones of mmdetection do that by ``norm_eval`` and ``frozen_stages``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .domain_batch_norm import state_holders
from .freeze import freeze_statistics, is_frozen, thaw_statistics
from .kinds import batch_norms, why_lazy
from .types import AnyBatchNorm, has_statistics


def kept_in_evaluation(model: nn.Module) -> set[AnyBatchNorm]:
    """The BatchNorm layers in evaluation mode that the next train() of a model leaves there.

    It is tried out, on a copy without values; where a train() fails there, none are.
    """
    kept: set[AnyBatchNorm] = set()
    for part in _with_own_train(model):
        layers = batch_norms(part).items()
        standing = {
            name: layer for layer, name in layers if not (layer.training or is_frozen(layer))
        }
        if standing and (trained := _trained_copy(part)) is not None:
            kept |= {m for name, m in standing.items() if not trained.get_submodule(name).training}
    return kept


@contextmanager
def as_frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers that :func:`kept_in_evaluation` finds are frozen for all of us."""
    kept = [layer for layer in kept_in_evaluation(model) if _has_statistics(layer)]
    for layer in kept:
        freeze_statistics(layer)
    try:
        yield
    finally:
        for layer in kept:
            thaw_statistics(layer)
            layer.eval()


def _with_own_train(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose train() is not torch's, without those in them."""
    if type(module).train is not nn.Module.train or "train" in vars(module):
        yield module
    else:
        for child in module.children():
            yield from _with_own_train(child)


def _trained_copy(part: nn.Module) -> nn.Module | None:
    """A copy after train(), whose tensors have no values; None where it cannot be had."""
    modes = [(module, module.training) for module in part.modules()]
    try:
        memo = {id(t): _without_values(t) for t in (*part.parameters(), *part.buffers())}
        trained = copy.deepcopy(part, memo)
        trained.train()
        return trained
    except Exception:  # of somebody else's code
        return None
    finally:  # a train() that was assigned may know the module itself
        for module, mode in modes:
            module.training = mode


def _without_values(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _has_statistics(layer: AnyBatchNorm) -> bool:
    return not why_lazy(layer) and all(has_statistics(of) for of, _ in state_holders(layer))
