"""A convolutional head on all levels of a feature pyramid at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import of_other_type
from .domain_batch_norm import DomainBatchNorm2d
from .kernels import one_launch
from .watched import is_watched


class PerLevel(nn.ModuleList):
    """A module for each level; takes a list of levels.

    What a convolution that levels share becomes where a BatchNorm with statistics or affine per
    level is folded into it; and a norm that knows of no levels.
    """

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self, features, strict=True)]


_FOR_LISTS = (DomainBatchNorm2d, PerLevel)


def forward_levels(
    layers: Iterable[Callable[..., Any]], features: Sequence[Tensor]
) -> list[Tensor]:
    """Apply layers that all levels share, layer by layer over the list of levels.

    Level by level would give the same for a convolution, but a layer that normalizes levels
    together (:class:`DomainBatchNorm2d`), or each otherwise, has to see all of them at once. A ReLU
    that follows such a layer is computed with it where Triton's kernels are.

    Args:
        layers: modules in the order of application; an ``nn.Sequential`` among them is taken
            apart, and so is a convolution with a layer for lists in it (Detectron2's ``Conv2d``,
            with ``norm`` and ``activation``), past hooks of its own.
        features: one tensor of shape (N, C, H_k, W_k) for each level.

    Returns:
        One tensor for each level.

    Raises:
        InputError: ``features`` is a tensor, whose samples would be taken for levels.
    """
    if isinstance(features, Tensor):
        raise of_other_type("features", features, "a list of tensors, one for each level")
    xs = list(features)
    steps = list(_steps(layers))
    while steps:
        step, *steps = steps
        has_relu = xs and steps and _has_relu(step, steps[0])
        if has_relu and one_launch(xs) is not None:
            xs = step.call(xs, relu=True)
            steps = steps[1:]
        elif isinstance(step.call, _FOR_LISTS):
            xs = step.call(xs)
        else:
            # One weight for all levels. (A graph that is traced would hold it as a constant.)
            is_cached = parametrize.is_parametrized(step.owner) and not torch.jit.is_tracing()
            with parametrize.cached() if is_cached else nullcontext():
                xs = [step.call(x) for x in xs]
    return xs


class _Step(NamedTuple):
    """What is applied to the list, or to each level, and whose parameters it has."""

    call: Callable[..., Any]
    owner: Any


def _steps(layers: Iterable[Any]) -> Iterator[_Step]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _steps(layer)
        elif isinstance(getattr(layer, "norm", None), _FOR_LISTS):
            yield _Step(partial(nn.Conv2d.forward, layer), layer)
            yield from _steps([layer.norm])
            if layer.activation is not None:
                yield from _steps([layer.activation])
        else:
            yield _Step(layer, layer)


_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


def _has_relu(step: _Step, following: _Step) -> bool:
    """Whether a layer can compute the ReLU that follows it, and nobody sees what is between."""
    layer, relu = step.call, following.call
    if type(layer) is not DomainBatchNorm2d or is_watched(layer):
        return False
    return relu in _RELUS or (type(relu) is nn.ReLU and not is_watched(relu))
