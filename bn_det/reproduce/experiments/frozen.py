"""Section 4: BatchNorm frozen in the last fifth of a training."""

from __future__ import annotations

from ..steps import Setting, Step, Training, train
from .batch_size import SETS, loss_step, precise_step
from .batch_size import training as of_size

SIZE = 2
"""Images in a normalization batch."""


def trainings(setting: Setting, seed: int) -> tuple[Training, Training]:
    """The usual one, and the one that is frozen at the end."""
    usual = of_size(setting, seed, SIZE)
    name = f"{usual.name.removeprefix('train/').removesuffix(f'-seed{seed}')}-frozen"
    if setting.data == "shapes":
        config = ("batch_size", f"NBS_{SIZE}_frozen")
        return usual, train(setting, name, config, seed, 310, processes=2)
    opts = ("SOLVER.FREEZE_BN_ITER", 72000)
    return usual, train(setting, name, ("ways", "BN"), seed, 0, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    usual, frozen = trainings(setting, seed)
    weights = precise_step(usual, SIZE)
    found = [usual.step, weights, *(loss_step(usual, SIZE, data, weights) for data in SETS)]
    return [*found, frozen.step, *(loss_step(frozen, SIZE, data, None) for data in SETS)]
