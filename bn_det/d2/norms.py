"""Detectron2's normalization layers that have no choice of batch."""

from functools import partial

from detectron2.layers import get_norm

NORMS = {name: partial(get_norm, name) for name in ("FrozenBN", "GN", "LN")}
"""By Detectron2's names, each a callable from the number of channels."""
