"""A convolutional head on all levels of a feature pyramid at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .domain_batch_norm import DomainBatchNorm2d


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
    together (:class:`DomainBatchNorm2d`), or each otherwise, has to see all of them at once.

    Args:
        layers: modules in the order of application; an ``nn.Sequential`` among them is taken
            apart, and so is a convolution with a layer for lists in it (Detectron2's ``Conv2d``,
            with ``norm`` and ``activation``), past hooks of its own.
        features: one tensor of shape (N, C, H_k, W_k) for each level.

    Returns:
        One tensor for each level.
    """
    features = list(features)
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            features = forward_levels(layer, features)
        elif isinstance(layer, _FOR_LISTS):
            features = layer(features)
        else:
            # One weight for all levels. (A graph that is traced would hold it as a constant.)
            is_cached = parametrize.is_parametrized(layer) and not torch.jit.is_tracing()
            with parametrize.cached() if is_cached else nullcontext():
                features = _apply(layer, features)
    return features


def _apply(layer: Callable[..., Any], features: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(getattr(layer, "norm", None), _FOR_LISTS):
        return forward_levels(_steps(layer), features)
    return [layer(x) for x in features]


def _steps(conv: nn.Conv2d) -> Iterator[Callable[..., Any]]:
    yield partial(nn.Conv2d.forward, conv)
    yield conv.norm
    if conv.activation is not None:
        yield conv.activation
