"""What a config asks of a training: its hooks, its batches, its gradients' clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from ..doctor.from_training import Step
from ..errors import InputError, choose
from ..layers.renorm import RenormLimits
from ..training.agc import AdaptiveGradientClipping
from ..training.hooks import (
    AverageStatistics,
    FreezeBN,
    Hook,
    PreciseBN,
    RenormSchedule,
    TuneBN,
    VirtualBatch,
)
from ..training.mixed_precision import DTYPES
from ..training.monitor import Monitor
from ..training.spikes import LossSpikes
from .check import check_ims_per_batch, reference_processes
from .parts import PARTS


class Hooks(NamedTuple):
    """A host's classes of our hooks."""

    average: type[AverageStatistics] = AverageStatistics
    freeze: type[FreezeBN] = FreezeBN
    renorm: type[RenormSchedule] = RenormSchedule
    tune: type[TuneBN] = TuneBN
    spikes: type[LossSpikes] = LossSpikes
    monitor: type[Monitor] = Monitor


HOOKS = Hooks()


def precise_bn_of(cfg: CfgNode) -> dict[str, Any]:
    """What TEST.PRECISE_BN says, as arguments of ``bn_det.training.PreciseBN``."""
    node = cfg.TEST.PRECISE_BN
    return {
        "periods": [cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD],
        "num_iter": node.NUM_ITER,
        "tolerance": node.TOLERANCE,
        "estimator": node.ESTIMATOR,
    }


def uses_precise_bn(cfg: CfgNode) -> bool:
    """Whether a training needs a PreciseBN hook, now and then or before freezing."""
    return cfg.TEST.PRECISE_BN.ENABLED or _is_precise_before_freezing(cfg)


def _is_precise_before_freezing(cfg: CfgNode) -> bool:
    # What a training begins with has the statistics of its checkpoint.
    return cfg.SOLVER.FREEZE_BN_ITER > 0 and cfg.SOLVER.FREEZE_BN_PRECISE


def source_of(cfg: CfgNode) -> dict[str, int]:
    """The number of the source of each data set that DATASETS.SOURCES names."""
    return {name: k for k, (_, *names) in enumerate(cfg.DATASETS.SOURCES) for name in names}


def with_virtual_batches(cfg: CfgNode) -> CfgNode:
    """The config with the batches of extra images in place of the training's."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.VIRTUAL_IMAGES
    return cfg


def with_precise_bn_batches(cfg: CfgNode) -> CfgNode:
    """The config with the batches of PreciseBN, and their number, in place of the training's."""
    cfg, node = cfg.clone(), cfg.TEST.PRECISE_BN
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = node.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.MAX_ITER = node.NUM_ITER
    return cfg


def step_of(cfg: CfgNode, processes: int) -> Step:
    """What a step of a training is of, in batches of PreciseBN that one process has.

    Args:
        processes: of the training.
    """
    check_ims_per_batch(cfg, processes)
    images = (
        cfg.SOLVER.IMS_PER_BATCH / reference_processes(cfg, processes)
        + cfg.SOLVER.VIRTUAL_IMAGES / processes
    )
    share = images / with_precise_bn_batches(cfg).SOLVER.IMS_PER_BATCH
    return Step(processes, cfg.SOLVER.ACCUMULATE, share)


@contextmanager
def evaluated_by_batch(file: str) -> Iterator[None]:
    """Name TEST.BN_STATISTICS in an error that a test image raises inside the block."""
    try:
        yield
    except InputError as e:
        raise InputError(
            f"TEST.BN_STATISTICS: 'batch' is not accepted with {file}: {e}; or name "
            "other parts in TEST.BN_STATISTICS_PARTS"
        ) from e


def smallest_image(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of the image that has the fewest values at the deepest level in evaluation."""

    def longer_side(record: dict[str, Any]) -> float:
        sides = record["height"], record["width"]
        return max(sides) / min(sides) if cfg.INPUT.MIN_SIZE_TEST else max(sides)

    return min(records, key=longer_side)


def build_hooks(
    cfg: CfgNode,
    precise: PreciseBN | None,
    virtual: VirtualBatch | None,
    classes: Hooks = HOOKS,
) -> list[Hook]:
    """The hooks that a config asks for, in their order, all before those that evaluate and save.

    Args:
        precise: what TEST.PRECISE_BN and SOLVER.FREEZE_BN_PRECISE stand for, where one of them is.
        virtual: what SOLVER.VIRTUAL_IMAGES stands for, where it is.
        classes: the host's.
    """
    solver = cfg.SOLVER
    ret: list[Hook] = [classes.spikes(cfg.OUTPUT_DIR)]
    if any(cfg.MODEL[part].NORM == "BRN" for part in PARTS):
        node = solver.BRN
        limits = RenormLimits(node.R_MAX, node.D_MAX)
        iters = node.WARMUP_ITERS, node.R_MAX_ITER, node.D_MAX_ITER
        ret.append(classes.renorm(limits, *iters))
    if solver.FREEZE_BN_ITER > 0 or solver.FREEZE_BN_MODULES:
        ret.append(
            classes.freeze(
                solver.FREEZE_BN_ITER,
                affine=solver.FREEZE_BN_AFFINE,
                precise=precise if _is_precise_before_freezing(cfg) else None,
                modules=list(solver.FREEZE_BN_MODULES) or None,
            )
        )
    if solver.TUNE_BN:
        ret.append(classes.tune(solver.FREEZE_BN_ITER))
    if virtual is not None:
        ret.append(virtual)
    if cfg.TEST.BN_MONITOR:
        ret.append(classes.monitor(cfg.TEST.BN_MONITOR))
    if cfg.TEST.PRECISE_BN.ENABLED and precise is not None:
        ret.append(precise)
    if solver.AVERAGE_BN_STATISTICS:
        ret.append(classes.average([cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD]))
    return ret


def mixed_precision_of(cfg: CfgNode) -> torch.dtype | None:
    """What SOLVER.AMP has training compute in; None for float32 throughout."""
    node = cfg.SOLVER.AMP
    if not node.ENABLED:
        return None
    choose("SOLVER.AMP.DTYPE", node.DTYPE, DTYPES)
    return getattr(torch, node.DTYPE)


def clipping_of(cfg: CfgNode, model: nn.Module) -> AdaptiveGradientClipping:
    """What SOLVER.AGC says."""
    node = cfg.SOLVER.AGC
    return AdaptiveGradientClipping(model, node.CLIP_FACTOR, node.EPS, node.EXCLUDE)
