"""Section 3: the EMA against PreciseBN over training, samples that it takes, errors with depth."""

from __future__ import annotations

from ..steps import Setting, Step, Training, recompute, train
from .common import DETECTOR, base_training, precise_of

CASES = ("base", "learning rate x4", "SGD batch x4")
"""Whose EMA is compared with PreciseBN: with learning rate and batch as published, with four times
the learning rate, and with four times both, for the same epochs."""

SLOW = 0.01
"""The other momentum of the EMA; by default it is 0.1."""

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
"""Batches of 32 (on COCO of 16) images."""


def training(setting: Setting, seed: int, case: str) -> Training:
    if case == "base":
        return base_training(setting, seed)
    config = ("multi_domain", "per_domain-per_domain-shared")
    lr = setting.pick(0.08, 0.04)
    opts = ("TEST.PRECISE_BN.ENABLED", False, "SOLVER.BASE_LR", lr)
    if case == "learning rate x4":
        every = setting.pick(90, 27000)
        opts += ("SOLVER.CHECKPOINT_PERIOD", every)
        return train(setting, f"{DETECTOR}-lr_x4", config, seed, 260, opts)
    opts += setting.pick(
        (
            *("SOLVER.IMS_PER_BATCH", 32, "SOLVER.MAX_ITER", 225, "SOLVER.WARMUP_ITERS", 13),
            *("SOLVER.CHECKPOINT_PERIOD", 75),
        ),
        (
            *("SOLVER.IMS_PER_BATCH", 64, "SOLVER.MAX_ITER", 67500),
            *("SOLVER.STEPS", "(52500,62500)", "SOLVER.CHECKPOINT_PERIOD", 22500),
        ),
    )
    return train(setting, f"{DETECTOR}-batch_x4", config, seed, 240, opts)


def slow_training(setting: Setting, seed: int) -> Training:
    """With the weights of the base training, and another EMA, which is evaluated all along."""
    every = setting.pick(90, 27000)
    config = ("multi_domain", "per_domain-per_domain-shared")
    opts = ("TEST.PRECISE_BN.ENABLED", False, "SOLVER.BN_MOMENTUM", SLOW)
    opts += ("TEST.EVAL_PERIOD", every, "SOLVER.CHECKPOINT_PERIOD", 10 * every)
    return train(setting, f"{DETECTOR}-momentum_{SLOW}", config, seed, 330, opts)


def checkpoints(setting: Setting, case: str) -> list[int]:
    """Iterations, counted from 1, of the checkpoints that are looked at."""
    if case == "SGD batch x4":
        return [k * setting.pick(75, 22500) for k in (1, 2, 3)]
    return [k * setting.pick(90, 27000) for k in range(1, 11)]


def progress(setting: Setting, case: str, iteration: int) -> float:
    """The part of the training that is done."""
    return iteration / checkpoints(setting, case)[-1]


def precise_step(of: Training, iteration: int) -> Step:
    return precise_of(of, f"precise-{iteration}", iteration=iteration)


def samples_step(of: Training, number: int) -> Step:
    opts = of.setting.pick(("TEST.PRECISE_BN.IMS_PER_BATCH", 32), ())
    flags = ("--num-iters", number)
    return recompute(of, f"precise-of_{number}_batches", 26 + number, flags, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for case in CASES:
        of = training(setting, seed, case)
        steps.append(of.step)
        steps += [precise_step(of, iteration) for iteration in checkpoints(setting, case)]
    base = training(setting, seed, "base")
    steps += [samples_step(base, number) for number in SAMPLES]
    return [*steps, slow_training(setting, seed).step]
