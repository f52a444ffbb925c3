"""Types of layers for annotations: a BatchNorm whoever wrote it, and what is known once one looked.

A module is never made of these classes, nor asked for them: what it has decides, and functions that
look at it say so by a ``TypeGuard``.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard, overload

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class HostFrozen(nn.Module):
    """A host's FrozenBatchNorm2d, which is no BatchNorm by type: all of its state is buffers."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor


AnyBatchNorm = _NormBase | HostFrozen
"""Torch's, ours, and frozen ones: statistics and affine are None where a layer has none."""


class NormWithStatistics(_NormBase):
    """One of torch's or ours, or frozen by us, that has population statistics."""

    running_mean: Tensor
    running_var: Tensor


WithStatistics = NormWithStatistics | HostFrozen
"""Any that has population statistics."""


class WithAffine(nn.Module):
    """What has weight and bias for others: Detectron2's CycleBatchNormList."""

    weight: Tensor
    bias: Tensor


class Statistics(Protocol):
    """What may have population statistics."""

    @property
    def running_mean(self) -> Tensor | None: ...

    @property
    def running_var(self) -> Tensor | None: ...


class Affine(Protocol):
    """What has weight and bias: a layer, or one in a file."""

    @property
    def weight(self) -> Tensor | None: ...

    @property
    def bias(self) -> Tensor | None: ...


@overload
def has_statistics(layer: _NormBase) -> TypeGuard[NormWithStatistics]: ...


@overload
def has_statistics(layer: Statistics) -> TypeGuard[WithStatistics]: ...


def has_statistics(layer: Statistics) -> bool:
    """Whether a BatchNorm has population statistics (``track_running_stats``)."""
    return layer.running_mean is not None
