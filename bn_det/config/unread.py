"""Which of our keys a set-up reads: what is set and read by nothing is refused, or warned of."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from operator import attrgetter

from yacs.config import CfgNode

from ..errors import InputError
from ..layers import BASELINES, BATCH_NORMS
from .keys import our_keys
from .ours import HOOKS, KEYS, TRAINER
from .parts import (
    NF_BACKBONES,
    PARTS,
    ROI_PARTS,
    has_our_batch_norm,
    is_built,
    why_not_built,
    why_not_ours,
)

logger = logging.getLogger(__name__)

OUR_NORMS = {"GhostBN", "BRN", *BASELINES}
"""The names of norms that Detectron2's own components do not know."""


def check_read(cfg: CfgNode, typed: Collection[str] = ()) -> None:
    """Raise InputError, or warn, for keys of ours with another value than by default, for nothing.

    It is an error where somebody else's component is built in the place of ours, and a warning
    where ours is built with a norm that the key is not for, as a config may inherit it.

    Args:
        typed: the keys that a command was given, which none inherits.
    """
    for part in PARTS:
        _check_norm(cfg, part)
    for key, reason, is_error in _unread(cfg, typed):
        value = attrgetter(key)(cfg)
        if value == (KEYS[key].default if key in KEYS else ""):  # a NORM of the hosts
            continue
        if is_error:
            raise InputError(f"{key}: {value!r} is not accepted with {reason}")
        logger.warning("%s: %r does nothing with %s", key, value, reason)


def warn_of_others(cfg: CfgNode) -> None:
    """Warn of what :func:`check_read` refuses, for a config whose components may be a project's."""
    for part in PARTS:
        if reason := _why_norm_unknown(cfg, part):
            logger.warning("MODEL.%s.NORM: %r is ours: %s", part, cfg.MODEL[part].NORM, reason)
    for key, reason, is_error in _unread(cfg, ()):
        value = attrgetter(key)(cfg)
        if is_error and value != KEYS[key].default:
            logger.warning("%s: %r does nothing with %s", key, value, reason)


def _check_norm(cfg: CfgNode, part: str) -> None:
    if reason := _why_norm_unknown(cfg, part):
        norm = cfg.MODEL[part].NORM
        raise InputError(f"MODEL.{part}.NORM: {norm!r} is not accepted with {reason}")


def _why_norm_unknown(cfg: CfgNode, part: str) -> str:
    """The component that a norm of ours is for, and which is another one, if so."""
    is_ours = cfg.MODEL[part].NORM in OUR_NORMS and is_built(cfg, part)
    return why_not_ours(cfg, part) if is_ours else ""


def _unread(cfg: CfgNode, typed: Collection[str]) -> Iterator[tuple[str, str, bool]]:
    """Keys that nothing reads: each with the reason, and whether another component is it."""
    for part in PARTS:
        if elsewhere := why_not_built(cfg, part):
            keys = [key for key in KEYS if key.startswith(f"MODEL.{part}.")]
            # That of RETINANET is in what configs of FCOS are based on.
            of_norm = f"MODEL.{part}.NORM"
            keys += [of_norm] if part in ROI_PARTS or of_norm in typed else []
            for key in dict.fromkeys(keys):
                yield key, elsewhere, False
            continue
        reason, norm = why_not_ours(cfg, part), cfg.MODEL[part].NORM
        of_norm = f"MODEL.{part}.NORM {norm!r}"
        keys = [f"BN.{key}" for key in cfg.MODEL[part].get("BN", {})]
        keys += ["SHUFFLE"] if part in ROI_PARTS else []
        for key in keys:
            if reason and is_built(cfg, part):
                yield f"MODEL.{part}.{key}", reason, True
            elif norm not in BATCH_NORMS and key != "SHUFFLE":  # of which its head warns
                yield f"MODEL.{part}.{key}", f"{of_norm}, which has no batch", False
        for key in ("GHOST_SIZE", "GHOST_ORDER"):
            if reason and is_built(cfg, part):  # and with 'GhostBN' it is an error above
                yield f"MODEL.{part}.{key}", reason, False
            elif norm != "GhostBN":
                yield f"MODEL.{part}.{key}", f"{of_norm}; it is for 'GhostBN'", False
    if not any(has_our_batch_norm(cfg, part) for part in PARTS):
        for key in ("SOLVER.BN_MOMENTUM", "SOLVER.UPDATE_POPULATION"):
            yield key, "no part of the model that has BatchNorm of ours", False
    if not any(cfg.MODEL[part].NORM == "BRN" for part in PARTS):
        for key in cfg.SOLVER.BRN:
            yield f"SOLVER.BRN.{key}", "a model that has NORM 'BRN' nowhere", False
    if not cfg.MODEL.BN_SOURCES.PARTS:
        yield "MODEL.BN_SOURCES.AFFINE", "MODEL.BN_SOURCES.PARTS ()", False
    if cfg.MODEL.BACKBONE.NAME not in NF_BACKBONES:
        for key in cfg.MODEL.NF:
            yield f"MODEL.NF.{key}", f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}", False
    for node, statistics in (("TEST", "population"), ("SOLVER", "batch")):
        if statistics == cfg[node].BN_STATISTICS:
            yield f"{node}.BN_STATISTICS_PARTS", f"{node}.BN_STATISTICS {statistics!r}", False
    if not cfg.SOLVER.FREEZE_BN_ITER:
        yield "SOLVER.FREEZE_BN_PRECISE", "SOLVER.FREEZE_BN_ITER 0", False
        if not cfg.SOLVER.FREEZE_BN_MODULES:
            reason = "SOLVER.FREEZE_BN_ITER 0 and FREEZE_BN_MODULES []: no BN is frozen"
            yield "SOLVER.FREEZE_BN_AFFINE", reason, False
    if not cfg.SOLVER.AMP.get("ENABLED"):
        yield "SOLVER.AMP.DTYPE", "SOLVER.AMP.ENABLED False", False
    if not cfg.SOLVER.AGC.ENABLED:
        for key in cfg.SOLVER.AGC:
            yield f"SOLVER.AGC.{key}", "SOLVER.AGC.ENABLED False", False


HOOK_KEYS = tuple(key for key, described in KEYS.items() if described.reader == HOOKS)
"""What our hooks read."""

TRAINER_KEYS = tuple(key for key, described in KEYS.items() if described.reader == TRAINER)
"""What our trainers read, beside their hooks."""


def set_keys(cfg: CfgNode, keys: tuple[str, ...]) -> list[str]:
    """Those of some keys of ours that have another value than by default."""
    default = our_keys()
    return [key for key in keys if attrgetter(key)(cfg) != attrgetter(key)(default)]
