"""Our config keys, on any yacs CfgNode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

from ..errors import InputError
from .ours import KEYS
from .parts import PARTS

_DETECTRON2 = (
    *("MODEL", *(f"MODEL.{part}" for part in PARTS if part != "BN_FCOS")),
    *("SOLVER", "TEST", "TEST.PRECISE_BN", "DATASETS", "DATALOADER"),
)
"""The nodes of Detectron2 that have keys of ours."""


def add_bn_det_config(cfg: CfgNode) -> None:
    """Add the keys of bn_det to a config that has Detectron2's, in place.

    What is there stays: keys of other projects, and ours with their values, so that a second call
    changes nothing. Other projects may add theirs before or after it.

    Raises:
        InputError: a key of ours is there with a value of another type, a node of Detectron2 is
            not there, or one that lacks a key is frozen; the config is as it was.
    """
    ours = our_keys(type(cfg))
    _check_fit(ours, cfg)
    _add_missing(ours, cfg)


def check_keys(cfg: CfgNode) -> None:
    """Raise InputError unless a config has all keys of ours."""
    _check_there(our_keys(), cfg)


def our_keys(node: type[CfgNode] = CfgNode) -> CfgNode:
    """The keys of bn_det alone, with their defaults, below the nodes of Detectron2."""
    cfg = node()
    for path in _DETECTRON2:
        *above, name = path.split(".")
        parent = cfg
        for step in above:
            parent = parent[step]
        parent[name] = node()

    for path, key in KEYS.items():
        *above, name = path.split(".")
        parent = cfg
        for step in above:
            parent = parent.setdefault(step, node())
        parent[name] = copy.deepcopy(key.default)
    return cfg


def leaves(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a config, with their values."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_fit(ours: CfgNode, cfg: CfgNode, prefix: str = "") -> None:
    for name, default in ours.items():
        key = prefix + name
        if name not in cfg:
            if key in _DETECTRON2:
                raise InputError(
                    f"add_bn_det_config: the config has no node {key}; it takes one with the keys "
                    "of Detectron2"
                )
            if cfg.is_frozen():
                raise InputError(
                    f"{key}: cannot be added to a frozen config; call add_bn_det_config before "
                    "freeze()"
                )
        elif isinstance(default, CfgNode) and isinstance(cfg[name], CfgNode):
            _check_fit(default, cfg[name], f"{key}.")
        elif _kind(cfg[name]) is not _kind(default):
            found, accepted = type(cfg[name]).__name__, _kind(default).__name__
            raise InputError(
                f"{key}: {cfg[name]!r} is there already, of type {found}, where bn_det has a key "
                f"of this name and of type {accepted}; use that type, or another name"
            )


def _kind(value: object) -> type:
    """The type of a value, or that with which yacs exchanges it."""
    if isinstance(value, CfgNode):
        return CfgNode
    return list if isinstance(value, tuple) else type(value)


def _add_missing(ours: CfgNode, cfg: CfgNode) -> None:
    for name, default in ours.items():
        if name not in cfg:
            cfg[name] = default
        elif isinstance(default, CfgNode):
            _add_missing(default, cfg[name])


def _check_there(ours: CfgNode, cfg: CfgNode, prefix: str = "") -> None:
    for name, default in ours.items():
        if not isinstance(cfg, CfgNode) or name not in cfg:
            raise InputError(
                f"{prefix}{name}: the config does not have this key of bn_det; call "
                "bn_det.add_bn_det_config(cfg) after what replaces nodes of the config"
            )
        if isinstance(default, CfgNode):
            _check_there(default, cfg[name], f"{prefix}{name}.")
