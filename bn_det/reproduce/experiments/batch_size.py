"""Section 4: normalization batches of several sizes, with one SGD batch."""

from __future__ import annotations

from .. import steps
from ..steps import Setting, Step, Training, precise, recompute, train

IMAGES = 640
"""On shapes, for PreciseBN."""

SETS = ("train", "validation")


def sizes(setting: Setting) -> tuple[int, ...]:
    """Images in a normalization batch. On COCO those of a GPU, and of all."""
    return setting.pick((2, 4, 8, 16), (2, 16))


def training(setting: Setting, seed: int, size: int) -> Training:
    names = setting.pick({s: f"NBS_{s}" for s in (2, 4, 8, 16)}, {2: "BN", 16: "SyncBN"})
    config = (setting.pick("batch_size", "ways"), names[size])
    return train(setting, f"retinanet-nbs_{size}", config, seed, 300, processes=2)


def precise_step(of: Training, size: int) -> Step:
    """Population statistics of the model with normalization batches as in training."""
    number = of.setting.pick(IMAGES // size, 200)
    opts = ("TEST.PRECISE_BN.IMS_PER_BATCH", size, "TEST.PRECISE_BN.NUM_ITER", number)
    return recompute(of, "precise", 45, (), opts)


def loss_step(of: Training, size: int, data: str, weights: Step | None) -> Step:
    """The loss on either set, with population statistics and with those of batches of that size.

    Args:
        weights: PreciseBN's; None for the training's own.
    """
    setting = of.setting
    train_set = setting.pick("shapes_few_train", "coco_2017_train")
    opts = ("DATASETS.TEST", f"('{train_set}',)") if data == "train" else ()
    name = f"loss-{data}"
    if weights is None:
        return steps.loss(of, name, 25, size, opts)
    file = precise(setting, weights)
    return steps.loss(of, name, 25, size, opts, weights=file, needs=[weights.name])


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for size in sizes(setting):
        of = training(setting, seed, size)
        weights = precise_step(of, size)
        found += [of.step, weights, *(loss_step(of, size, data, weights) for data in SETS)]
    return found
