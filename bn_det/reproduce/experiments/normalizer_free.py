"""Brock et al. 2021: without normalization, with adaptive gradient clipping and without."""

from __future__ import annotations

import math
from statistics import mean

from ..results import Line, Panel, Picture, Results, Row, Table, difference, draw, known, ratio
from ..steps import Setting, Step, Training, train

FACTORS = (None, 0.16, 0.04, 0.01)
"""Of adaptive gradient clipping; None is without it."""


def batch_sizes(setting: Setting) -> tuple[int, int]:
    """Images of a step; the learning rate is scaled with it, and epochs are the same."""
    return setting.pick((8, 32), (16, 64))


def training(setting: Setting, seed: int, images: int, factor: float | None) -> Training:
    is_large = images > batch_sizes(setting)[0]
    opts: list[object] = ["SOLVER.AGC.ENABLED", factor is not None]
    if factor is not None:
        opts += ["SOLVER.AGC.CLIP_FACTOR", factor]
    if is_large:
        opts += setting.pick(
            [
                *("SOLVER.BASE_LR", 0.005, "SOLVER.IMS_PER_BATCH", images),
                *("SOLVER.MAX_ITER", 75, "SOLVER.WARMUP_ITERS", 25),
            ],
            [
                *("SOLVER.IMS_PER_BATCH", images, "SOLVER.BASE_LR", 0.04),
                *("SOLVER.MAX_ITER", 22500, "SOLVER.STEPS", "(15000,20000)"),
            ],
        )
    else:  # at twice the rate it diverges without clipping
        opts += setting.pick(["SOLVER.BASE_LR", 0.00125], [])
    clip = "no_agc" if factor is None else f"agc_{factor:g}"
    return train(setting, f"nf-batch_{images}-{clip}", ("ways", "NF"), seed, 240, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    images = batch_sizes(setting)
    return [training(setting, seed, n, factor).step for n in images for factor in FACTORS]


DEFAULT = 0.01
"""The factor of the paper's Sec. 4, and of our configs."""


def final_loss(results: Results, seed: int, images: int, factor: float | None) -> float | None:
    """The mean of the last tenth; of a training that diverged, its first."""
    of = training(results.setting, seed, images, factor)
    lines = [line for line in results.metrics(of) if "total_loss" in line]
    if of.name not in results.outcomes:
        return None
    if results.diverged(of.name):
        if not lines:  # before the first line; its like began with the same loss
            lines = results.metrics(training(results.setting, seed, images, DEFAULT))
        return lines[0]["total_loss"] if lines else None
    last = lines[-1]["iteration"] + 1
    return mean(line["total_loss"] for line in lines if line["iteration"] + 1 > 0.9 * last)


def ap(results: Results, seed: int, images: int, factor: float | None) -> float | None:
    step = training(results.setting, seed, images, factor).step
    return results.ap(step, "results.json", "bbox")


def diverged_at(results: Results, seed: int, images: int, factor: float | None) -> float | None:
    outcome = results.outcomes.get(training(results.setting, seed, images, factor).name)
    return None if outcome is None else outcome.diverged_at


def larger_batches(results: Results, seed: int) -> float | None:
    usual, large = batch_sizes(results.setting)
    costs = [
        difference(
            final_loss(results, seed, large, factor), final_loss(results, seed, usual, factor)
        )
        for factor in (None, DEFAULT)
    ]
    return ratio(difference(*costs), final_loss(results, seed, usual, None))


def clip_factor(results: Results, seed: int) -> float | None:
    best = []
    for images in batch_sizes(results.setting):
        factors = [f for f in FACTORS if f is not None]
        losses = known(final_loss(results, seed, images, f) for f in factors)
        if not losses:
            return None
        best.append(math.log2(factors[losses.index(min(losses))]))
    return difference(*best)


EFFECTS = {"AGC, large batch": larger_batches, "AGC, clip factor": clip_factor}


def show(results: Results) -> list[Table | Picture]:
    rows, panels, seed = [], [], results.seeds[0]
    for images in batch_sizes(results.setting):
        lines = []
        for factor in FACTORS:
            of = training(results.setting, seed, images, factor)
            cells = tuple(
                results.over_seeds(value, images, factor) for value in (final_loss, ap, diverged_at)
            )
            rows.append(Row((str(images), str(factor or "without")), cells, (of.step,)))
            points = {
                line["iteration"] + 1: line["total_loss"]
                for line in results.metrics(of)
                if "total_loss" in line
            }
            name = f"factor {factor}" if factor else "without clipping"
            lines.append(Line(name, list(points), [[v] for v in points.values()]))
        panels.append(Panel(f"{images} images a step", "iterations", "training loss", lines, "y"))
    labels = ("images a step", "clip factor")
    columns = ("training loss at the end", "box AP", "diverged at iteration")
    title = "Without normalization: adaptive gradient clipping"
    note = "Of a training that diverged, the loss is its first."
    table = Table("normalizer_free", title, labels, columns, (3, 1, 0), rows, note)
    caption = "Training losses of the first seed."
    return [table, Picture("normalizer_free", caption, draw(panels))]
