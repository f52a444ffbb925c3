"""Table 5: whose samples normalize a RetinaNet head's levels, and whose statistics are kept."""

from __future__ import annotations

from ..steps import Setting, Step, Training, train
from .common import DETECTOR, base_training, precise_of

SHARING = ("shared", "per_domain")


def training(setting: Setting, seed: int, statistics: str, affine: str) -> Training:
    """One training for every population choice: these do not touch the weights."""
    if (statistics, affine) == ("per_domain", "shared"):
        return base_training(setting, seed)
    opts = ("MODEL.RETINANET.BN.AFFINE", affine, "TEST.PRECISE_BN.ENABLED", False)
    name = f"{DETECTOR}-{statistics}-affine_{affine}"
    config = ("multi_domain", f"{statistics}-{statistics}-shared")
    return train(setting, name, config, seed, 260, opts)


def population_step(of: Training, population: str) -> Step:
    return precise_of(of, f"precise-{population}", ("--population", population))


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for affine in SHARING:
        for statistics in SHARING:
            of = training(setting, seed, statistics, affine)
            steps += [of.step, *(population_step(of, population) for population in SHARING)]
    return steps
