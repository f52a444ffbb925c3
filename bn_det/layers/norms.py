"""Normalization layers by name or callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ..errors import InputError
from .batch_norm import BatchNorm2d
from .domain_batch_norm import DomainBatchNorm2d

NormFactory = Callable[[int], nn.Module]
"""From a number of channels to a layer for inputs of shape (N, C, H, W)."""


def norm_factory(
    norm: str | NormFactory | None, others: Mapping[str, NormFactory], key: str = "norm"
) -> NormFactory | None:
    """The layer that a name stands for.

    Args:
        norm: "" or None for none, "BN" for :class:`BatchNorm2d`, a name in others, or a callable,
            which is returned as it is.
        others: the layers without a choice of batch (FrozenBN, GN, LN) by name, which each host
            has its own of.
        key: what the error calls the value, a config key for example.

    Returns:
        A callable from the number of channels to the layer, or None for no normalization.

    Raises:
        InputError: the name is unknown.
    """
    return _factory(norm, {"BN": BatchNorm2d, **others}, key)


def level_norm_factory(
    norm: str | NormFactory | None,
    others: Mapping[str, NormFactory],
    num_levels: int,
    *,
    statistics: str,
    population: str,
    affine: str,
    key: str = "norm",
) -> NormFactory | None:
    """As :func:`norm_factory`, for a head that is applied to several feature levels.

    "BN" stands for :class:`DomainBatchNorm2d` over ``num_levels`` domains with the three choices;
    the others are applied to each level by itself.
    """
    joint = partial(
        DomainBatchNorm2d,
        num_domains=num_levels,
        statistics=statistics,
        population=population,
        affine=affine,
    )
    return _factory(norm, {"BN": joint, **others}, key)


def _factory(
    norm: str | NormFactory | None, named: Mapping[str, NormFactory], key: str
) -> NormFactory | None:
    if not norm:
        return None
    if callable(norm):
        return norm
    if norm not in named:
        raise InputError(f"{key}: {norm!r} is not accepted; use one of {['', *named]}")
    return named[norm]
