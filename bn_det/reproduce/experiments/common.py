"""Trainings and measurements that several experiments have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..results import Results, average
from ..steps import Setting, Step, Training, recompute, train

DETECTOR = "retinanet"

LABORATORIES = ("bccd", "bcd", "pbc")
"""Those of blood cells that are trained on."""

JOINT = ("blood_cells", "retinanet_joint")
"""The config of the base training on blood cells."""


def cells(laboratories: Iterable[str], split: str) -> tuple[str, ...]:
    """The names of data sets of laboratories, "train" or "val"."""
    return tuple(f"blood_cells_{name}_{split}" for name in laboratories)


def base_config(setting: Setting) -> tuple[str, str]:
    """Of the base training; on shapes and COCO row 4 of Table 5."""
    row_4 = ("multi_domain", "per_domain-per_domain-shared")
    return setting.pick(row_4, row_4, JOINT)


COCO_CHECKPOINT_PERIOD = 9000
"""Iterations between checkpoints on COCO: more often than they are looked at, to resume from."""


def base_training(setting: Setting, seed: int) -> Training:
    """RetinaNet with EMAs, and checkpoints all along: what experiments on these look at.

    Its levels are normalized each by itself, as in row 4 of Table 5, and those of blood cells, in
    images of three laboratories, together.
    """
    if setting.data == "cells":
        return train(setting, "retinanet_joint", JOINT, seed, CELLS_SECONDS)
    period = setting.pick(90, COCO_CHECKPOINT_PERIOD)
    opts = ("TEST.PRECISE_BN.ENABLED", False, "SOLVER.CHECKPOINT_PERIOD", period)
    name = f"{DETECTOR}-per_domain-affine_shared"
    return train(setting, name, base_config(setting), seed, 430, opts)


CELLS_SECONDS = 800
"""Of a training on blood cells, evaluated on four laboratories."""


def precise_batches(setting: Setting) -> tuple[object, ...]:
    """What PreciseBN estimates from: 640 small images in batches of 32 (docs/population.md).

    On COCO as published, whatever a training's batches are.
    """
    images, number = setting.pick((32, 20), (16, 200))
    return ("TEST.PRECISE_BN.IMS_PER_BATCH", images, "TEST.PRECISE_BN.NUM_ITER", number)


def precise_of(
    training: Training, name: str, flags: Sequence[object] = (), iteration: int | None = None
) -> Step:
    """PreciseBN of a checkpoint, and AP before and after."""
    setting, opts = training.setting, precise_batches(training.setting)
    if setting.data == "cells":  # not on the laboratory that is new
        opts += ("DATASETS.TEST", cells(LABORATORIES, "val"))
    weights = training.checkpoint(iteration)
    return recompute(training, name, setting.pick(31, 0, 110), flags, opts, weights=weights)


def adabn_of(training: Training, name: str, data_set: str) -> Step:
    """AdaBN on a data set, and AP there before and after."""
    flags, opts = ("--adabn", "--dataset", data_set), ("TEST.PRECISE_BN.IMS_PER_BATCH", 32)
    seconds = training.setting.pick(26, 0, 50)
    return recompute(training, f"adabn-{name}", seconds, flags, opts)


def box_ap(results: Results, step: Step, file: str, *keys: str) -> float | None:
    """Box AP in a step's file, by keys; on blood cells the mean over LABORATORIES."""
    if results.setting.data != "cells":
        return results.ap(step, file, *keys, "bbox")
    data_sets = cells(LABORATORIES, "val")
    return average(results.ap(step, file, *keys, name, "bbox") for name in data_sets)
