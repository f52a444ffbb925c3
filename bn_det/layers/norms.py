"""Normalization layers by name or callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ..errors import InputError
from .batch_norm import BatchNorm2d
from .domain_batch_norm import DomainBatchNorm2d
from .sources import SourceBatchNorm2d

NormFactory = Callable[[int], nn.Module]
"""From a number of channels to a layer for inputs of shape (N, C, H, W)."""


BATCH_NORMS = ("BN", "SyncBN", "GhostBN")
"""The names that stand for our layers."""


def norm_factory(
    norm: str | NormFactory | None,
    others: Mapping[str, NormFactory],
    key: str = "norm",
    *,
    ghost_size: int = 0,
    ghost_order: str = "contiguous",
    eval_statistics: str = "population",
    num_sources: int = 0,
    source_affine: str = "shared",
) -> NormFactory | None:
    """The layer that a name stands for.

    Args:
        norm: "" or None for none; "BN" for :class:`BatchNorm2d`, "SyncBN" for the same over all
            processes, "GhostBN" for the same in batches of ghost_size samples; a name in others;
            or a callable, which is returned as it is.
        others: the layers without a choice of batch (FrozenBN, GN, LN) by name, which each host
            has its own of.
        key: what the error calls the value, a config key for example.
        ghost_size, ghost_order: for "GhostBN".
        eval_statistics: what normalizes in evaluation, for our layers.
        num_sources: if not 0, our layers normalize images of so many sources, each by itself
            (:class:`SourceBatchNorm2d`).
        source_affine: then, whether sources share weight and bias: "shared" or "per_domain".

    Returns:
        A callable from the number of channels to the layer, or None for no normalization.

    Raises:
        InputError: the name is unknown, or "GhostBN" has no size.
    """
    layer = partial(BatchNorm2d, eval_statistics=eval_statistics)
    if num_sources:
        layer = partial(
            SourceBatchNorm2d,
            num_sources=num_sources,
            affine=source_affine,
            eval_statistics=eval_statistics,
        )
    return _factory(norm, layer, others, key, ghost_size, ghost_order)


def level_norm_factory(
    norm: str | NormFactory | None,
    others: Mapping[str, NormFactory],
    num_levels: int,
    *,
    statistics: str,
    population: str,
    affine: str,
    key: str = "norm",
    ghost_size: int = 0,
    ghost_order: str = "contiguous",
    eval_statistics: str = "population",
    num_sources: int = 0,
) -> NormFactory | None:
    """As :func:`norm_factory`, for a head that is applied to several feature levels.

    "BN", "SyncBN" and "GhostBN" stand for :class:`DomainBatchNorm2d` over ``num_levels`` domains
    with the three choices, and with ``num_sources`` for :class:`SourceBatchNorm2d`; the others are
    applied to each level by itself.
    """
    layer = partial(DomainBatchNorm2d, num_domains=num_levels)
    if num_sources:
        layer = partial(SourceBatchNorm2d, num_sources=num_sources, num_levels=num_levels)
    joint = partial(
        layer,
        statistics=statistics,
        population=population,
        affine=affine,
        eval_statistics=eval_statistics,
    )
    return _factory(norm, joint, others, key, ghost_size, ghost_order)


def _factory(
    norm: str | NormFactory | None,
    layer: NormFactory,
    others: Mapping[str, NormFactory],
    key: str,
    ghost_size: int,
    ghost_order: str,
) -> NormFactory | None:
    if not norm:
        return None
    if callable(norm):
        return norm
    named = {
        "BN": layer,
        "SyncBN": partial(layer, group="world"),
        "GhostBN": partial(layer, ghost_size=ghost_size, ghost_order=ghost_order),
        **others,
    }
    if norm not in named:
        raise InputError(f"{key}: {norm!r} is not accepted; use one of {['', *named]}")
    if norm == "GhostBN" and ghost_size < 1:
        ghost_key = key.replace("NORM", "GHOST_SIZE")
        raise InputError(
            f"{ghost_key}: {ghost_size!r} is not accepted; {key} 'GhostBN' takes 1 sample or more"
        )
    return named[norm]
