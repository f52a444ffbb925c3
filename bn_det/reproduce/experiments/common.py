"""Trainings and measurements that several experiments have in common."""

from __future__ import annotations

from collections.abc import Sequence

from ..steps import Setting, Step, Training, recompute, train

DETECTOR = "retinanet"

BASE = ("multi_domain", "per_domain-per_domain-shared")
"""The config of the base training, row 4 of Table 5."""


COCO_CHECKPOINT_PERIOD = 9000
"""Iterations between checkpoints on COCO: more often than they are looked at, to resume from."""


def base_training(setting: Setting, seed: int) -> Training:
    """RetinaNet whose levels are normalized each by itself, with EMAs, and checkpoints all along.

    Row 4 of Table 5, and what the experiments on population statistics look at.
    """
    period = setting.pick(90, COCO_CHECKPOINT_PERIOD)
    opts = ("TEST.PRECISE_BN.ENABLED", False, "SOLVER.CHECKPOINT_PERIOD", period)
    return train(setting, f"{DETECTOR}-per_domain-affine_shared", BASE, seed, 430, opts)


def precise_batches(setting: Setting) -> tuple[object, ...]:
    """What PreciseBN estimates from: on shapes 640 images in batches of 32 (docs/population.md).

    On COCO as published, whatever a training's batches are.
    """
    images, number = setting.pick((32, 20), (16, 200))
    return ("TEST.PRECISE_BN.IMS_PER_BATCH", images, "TEST.PRECISE_BN.NUM_ITER", number)


def precise_of(
    training: Training, name: str, flags: Sequence[object] = (), iteration: int | None = None
) -> Step:
    """PreciseBN of a checkpoint, and AP before and after."""
    opts = precise_batches(training.setting)
    weights = training.checkpoint(iteration)
    return recompute(training, name, 31, flags, opts, weights=weights)
