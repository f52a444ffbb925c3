"""Normalization layers by name or callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from ..errors import InputError
from .l1_batch_norm import L1BatchNorm2d
from .renorm import RenormLimits

NormFactory = Callable[[int], nn.Module]
"""From a number of channels to a layer for inputs of shape (N, C, H, W)."""


BATCH_NORMS = ("BN", "SyncBN", "GhostBN", "BRN")
"""The names that stand for our layers with a choice of batch."""

BASELINES: dict[str, NormFactory] = {
    "L1BN": L1BatchNorm2d,
    # The constants of Krizhevsky et al., *ImageNet Classification with Deep Convolutional Neural
    # Networks*, 2012, Sec. 3.3; torch divides alpha by size.
    "LRN": lambda _: nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0),
}
"""Other layers that are the same on every host, by name."""


def norm_factory(
    norm: str | NormFactory | None,
    layer: Callable[..., nn.Module],
    others: Mapping[str, NormFactory],
    key: str = "norm",
    *,
    ghost_key: str = "ghost_size",
    ghost_size: int = 0,
    ghost_order: str = "contiguous",
    renorm: Sequence[float] = RenormLimits(),
) -> NormFactory | None:
    """The layer that a name stands for.

    Args:
        norm: "" or None for none; "BN" for the layer, "SyncBN" for the same over all processes,
            "GhostBN" for the same in batches of ghost_size samples, "BRN" for the same with batch
            renormalization; a name in BASELINES or in others; or a callable, which is returned as
            it is.
        layer: a kind of :class:`BatchNorm2d`, which is called with the number of channels and with
            the choices that the name stands for.
        others: the layers (FrozenBN, GN, LN) by name that each host has its own of.
        key, ghost_key: what errors call the name and ghost_size, config keys for example.
        ghost_size, ghost_order: for "GhostBN".
        renorm: for "BRN", the limits.

    Returns:
        A callable from the number of channels to the layer, or None for no normalization.

    Raises:
        InputError: the name is unknown, or "GhostBN" has no size; from the callable for "GN": 32 is
            no divisor of the number of channels.
    """
    if not norm:
        return None
    if callable(norm):
        return norm
    named: dict[str, Callable[[int], nn.Module]] = {
        "BN": layer,
        "SyncBN": partial(layer, group="world"),
        "GhostBN": partial(layer, ghost_size=ghost_size, ghost_order=ghost_order),
        "BRN": partial(layer, renorm=renorm),
        **BASELINES,
        **others,
    }
    if norm not in named:
        raise InputError(f"{key}: {norm!r} is not accepted; use one of {['', *named]}")
    if norm == "GhostBN" and ghost_size < 1:
        raise InputError(
            f"{ghost_key}: {ghost_size!r} is not accepted; {key} 'GhostBN' takes 1 sample or more"
        )
    return partial(_in_groups, named[norm], key) if norm == "GN" else named[norm]


def _in_groups(make: NormFactory, key: str, channels: int) -> nn.Module:
    """The hosts' GN, which has 32 groups."""
    if channels % 32:
        raise InputError(
            f"{key}: 'GN' is not accepted with {channels} channels; use a multiple of 32"
        )
    return make(channels)
