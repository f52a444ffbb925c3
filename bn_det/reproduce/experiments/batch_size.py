"""Section 4: normalization batches of several sizes, with one SGD batch."""

from __future__ import annotations

import math
from statistics import mean

from .. import steps
from ..results import (
    Line,
    Panel,
    Picture,
    Results,
    Row,
    Table,
    average,
    by_layer,
    difference,
    draw,
    known,
    ratio,
)
from ..steps import Setting, Step, Training, precise, recompute, train

SETS = ("train", "validation")


def sizes(setting: Setting) -> tuple[int, ...]:
    """Images in a normalization batch. On COCO those of a GPU, and of all."""
    return setting.pick((2, 4, 8, 16), (2, 2 * setting.num_gpus))


def training(setting: Setting, seed: int, size: int) -> Training:
    on_coco = ("ways", "BN" if size == sizes(setting)[0] else "SyncBN")
    config = setting.pick(("batch_size", f"NBS_{size}"), on_coco)
    return train(setting, f"retinanet-nbs_{size}", config, seed, 280, processes=2)


def precise_images(setting: Setting) -> int:
    """That population statistics are estimated from."""
    return setting.pick(640, 3200)


def precise_step(of: Training, size: int) -> Step:
    """Population statistics of the model with normalization batches as in training.

    All sizes' from as many images.
    """
    number = precise_images(of.setting) // size
    opts = ("TEST.PRECISE_BN.IMS_PER_BATCH", size, "TEST.PRECISE_BN.NUM_ITER", number)
    return recompute(of, "precise", 35, (), opts)


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
        return steps.measure(of, "loss", name, 14, size, opts)
    file = precise(setting, weights)
    return steps.measure(of, "loss", name, 14, size, opts, weights=file, needs=[weights.name])


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for size in sizes(setting):
        of = training(setting, seed, size)
        weights = precise_step(of, size)
        found += [of.step, weights, *(loss_step(of, size, data, weights) for data in SETS)]
    return found


def losses(results: Results, seed: int, size: int, data: str, statistics: str) -> float | None:
    """The loss on either set, with "population" (PreciseBN) or "batch" statistics."""
    of = training(results.setting, seed, size)
    step = loss_step(of, size, data, precise_step(of, size))
    return results.at(step, "loss.json", statistics, "value")


def ap(results: Results, seed: int, size: int) -> float | None:
    """Box AP with PreciseBN."""
    step = precise_step(training(results.setting, seed, size), size)
    return results.ap(step, "precise.json", "results", "after", "bbox")


def spread(results: Results, seed: int, size: int) -> list[float]:
    """How much batches vary in the backbone, layer by layer, from the input on; empty if unknown.

    The standard deviations of their means, in standard deviations of the layer, and of their
    variances, relative; the mean of both.
    """
    step = precise_step(training(results.setting, seed, size), size)
    layers = results.at(step, "precise.json", "layers") or []
    layers = [of for of in layers if of["name"].startswith("backbone.") and "fpn" not in of["name"]]
    if not (errors := known(average((of["mean_error"], of["var_error"])) for of in layers)):
        return []  # as of a single batch
    return [e * math.sqrt(of["num_batches"]) for e, of in zip(errors, layers, strict=True)]


def small_batch_population(results: Results, seed: int) -> float | None:
    sizes_ = sizes(results.setting)
    gaps = []
    for size in (sizes_[0], sizes_[-1]):
        found = [losses(results, seed, size, "validation", s) for s in ("population", "batch")]
        gaps.append(difference(*found))
    base = losses(results, seed, sizes_[-1], "validation", "population")
    return ratio(difference(*gaps), base)


def small_batch_depth(results: Results, seed: int) -> float | None:
    found = spread(results, seed, sizes(results.setting)[0])
    third = len(found) // 3
    return mean(found[-third:]) / mean(found[:third]) - 1 if third else None


def batch_at_test(results: Results, seed: int) -> float | None:
    size = sizes(results.setting)[0]
    population = losses(results, seed, size, "validation", "population")
    found = difference(population, losses(results, seed, size, "validation", "batch"))
    return ratio(found, population)


def large_batch(results: Results, seed: int) -> float | None:
    sizes_, gaps = sizes(results.setting), []
    for size in (sizes_[-1], sizes_[1]):
        found = [
            losses(results, seed, size, data, "population") for data in ("validation", "train")
        ]
        gaps.append(difference(*found))
    base = losses(results, seed, sizes_[1], "validation", "population")
    return ratio(difference(*gaps), base)


EFFECTS = {
    "small batch, population": small_batch_population,
    "small batch, depth": small_batch_depth,
    "batch at test": batch_at_test,
    "large batch": large_batch,
}

CURVES = {
    "training set, population": ("train", "population"),
    "training set, batch": ("train", "batch"),
    "validation set, population": ("validation", "population"),
    "validation set, batch": ("validation", "batch"),
}


def show(results: Results) -> list[Table | Picture]:
    rows, setting = [], results.setting
    for size in sizes(setting):
        of = training(setting, results.seeds[0], size)
        weights = precise_step(of, size)
        cells = [results.over_seeds(losses, size, *of_curve) for of_curve in CURVES.values()]
        steps = (of.step, weights, *(loss_step(of, size, data, weights) for data in SETS))
        rows.append(Row((str(size),), (*cells, results.over_seeds(ap, size)), steps))
    columns = (*(f"loss, {name}" for name in CURVES), "box AP, PreciseBN")
    title = "Normalization batches of several sizes"
    note = "Population statistics are PreciseBN's; batches are of as many images as in training."
    labels = ("images normalized together",)
    table = Table("batch_size", title, labels, columns, (4, 4, 4, 4, 1), rows, note)
    return [table, Picture("batch_size", note, draw(_panels(results)))]


def _panels(results: Results) -> list[Panel]:
    xs, depth = sizes(results.setting), []
    lines = [
        Line(
            name,
            xs,
            [results.over_seeds(losses, size, data, statistics) for size in xs],
            data,
            statistics == "batch",
        )
        for name, (data, statistics) in CURVES.items()
    ]
    for size in xs:
        found = [spread(results, seed, size) for seed in results.seeds]
        depth.append(by_layer(f"batches of {size}", found))
    loss = Panel("Loss", "images normalized together", "loss", lines, "x")
    if not any(line.ys for line in depth):  # no BN in the backbone, or nothing done
        return [loss]
    vary = Panel("How batches vary", "layer of the backbone", "standard deviation", depth, "y")
    return [loss, vary]
