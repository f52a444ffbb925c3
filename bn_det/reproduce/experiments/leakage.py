"""Tables 3 and 6, Figure 9: what a BN in RoI heads leaks, and two remedies."""

from __future__ import annotations

from .. import steps
from ..steps import Setting, Step, Training, train

HEADS = ("BN", "BN_shuffle", "SyncBN")
BATCH = (
    "TEST.BN_STATISTICS", "batch",
    "TEST.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD','ROI_MASK_HEAD']",
)  # fmt: skip


def period(setting: Setting) -> int:
    """Iterations between the looks at a training: three of them."""
    return setting.pick(500, 90000)


def training(setting: Setting, seed: int, head: str) -> Training:
    every = period(setting)
    opts = ("SOLVER.CHECKPOINT_PERIOD", every, "TEST.EVAL_PERIOD", every)
    return train(setting, f"mask_rcnn-{head}", ("leakage", f"head_{head}"), seed, 400, opts, 2)


def iterations(setting: Setting) -> list[int]:
    return [k * period(setting) for k in (1, 2, 3)]


def leak_step(of: Training, iteration: int) -> Step:
    images = of.setting.pick(1, 2)
    weights = of.checkpoint(iteration)
    return steps.leakage(of, f"leakage-{iteration}", 20, images, weights=weights)


def batch_step(of: Training, iteration: int) -> Step:
    """AP with the statistics of the RoIs of each test image."""
    return steps.evaluate(of, f"batch-{iteration}", 28, BATCH, weights=of.checkpoint(iteration))


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for head in HEADS:
        of = training(setting, seed, head)
        found.append(of.step)
        for iteration in iterations(setting):
            found += [leak_step(of, iteration), batch_step(of, iteration)]
    return found
