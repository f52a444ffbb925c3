"""Section 6: batches of few categories with two samples of each, and groups across categories."""

from __future__ import annotations

from .. import steps
from ..steps import Setting, Step, Training, train

BATCHES = {"random": 4, "pairs": 4, "random_ghost": 2, "pairs_across": 2}
"""The configs, and the images that each normalizes together."""


def training(setting: Setting, seed: int, batches: str) -> Training:
    return train(setting, f"correlated-{batches}", ("correlated", batches), seed, 190)


def loss_step(of: Training, batches: str) -> Step:
    """The loss on validation images, in batches as those of the training."""
    return steps.loss(of, "loss", 25, BATCHES[batches])


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for batches in BATCHES:
        of = training(setting, seed, batches)
        found += [of.step, loss_step(of, batches)]
    return found
