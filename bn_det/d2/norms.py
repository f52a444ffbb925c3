"""The norms of a detector of Detectron2, by a config."""

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import get_norm

from ..config.keys import check_keys
from ..config.parts import part_norm
from ..layers.norms import NormFactory
from .default_trainer import check_trainer

NORMS = {name: partial(get_norm, name) for name in ("FrozenBN", "GN", "LN")}
"""Detectron2's layers that have no choice of batch, by its names; from a number of channels."""


def make_part_norm(cfg: CfgNode, part: str, num_levels: int | None = None) -> NormFactory | str:
    """The norm that a part of the model asks for; as ``part_norm``, but "" for none.

    Detectron2 decides by comparison with "" whether a convolution has a bias.

    Raises:
        InputError: the config lacks keys of ours, or is for another trainer than it is used in.
    """
    check_keys(cfg)
    make = part_norm(cfg, part, NORMS, num_levels)
    check_trainer(cfg, part, make)
    return make or ""
