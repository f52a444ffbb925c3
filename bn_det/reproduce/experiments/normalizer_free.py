"""Brock et al. 2021: without normalization, with adaptive gradient clipping and without."""

from __future__ import annotations

from ..steps import Setting, Step, Training, train

FACTORS = (None, 0.16, 0.04, 0.01)
"""Of adaptive gradient clipping; None is without it."""


def batch_sizes(setting: Setting) -> tuple[int, int]:
    """Images of a step; the learning rate is scaled with it, and epochs are the same."""
    return setting.pick((8, 32), (16, 64))


def training(setting: Setting, seed: int, images: int, factor: float | None) -> Training:
    scale = images // batch_sizes(setting)[0]
    opts: list[object] = ["SOLVER.AGC.ENABLED", factor is not None]
    if factor is not None:
        opts += ["SOLVER.AGC.CLIP_FACTOR", factor]
    if scale > 1:
        opts += setting.pick(
            [
                *("SOLVER.IMS_PER_BATCH", images, "SOLVER.BASE_LR", 0.08),
                *("SOLVER.MAX_ITER", 75, "SOLVER.WARMUP_ITERS", 13),
            ],
            [
                *("SOLVER.IMS_PER_BATCH", images, "SOLVER.BASE_LR", 0.04),
                *("SOLVER.MAX_ITER", 22500, "SOLVER.STEPS", "(15000,20000)"),
            ],
        )
    clip = "no_agc" if factor is None else f"agc_{factor:g}"
    return train(setting, f"nf-batch_{images}-{clip}", ("ways", "NF"), seed, 150, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    images = batch_sizes(setting)
    return [training(setting, seed, n, factor).step for n in images for factor in FACTORS]
