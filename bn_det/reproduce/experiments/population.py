"""Section 3: the EMA against PreciseBN over training, samples that it takes, errors with depth."""

from __future__ import annotations

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
from ..steps import Setting, Step, Training, recompute, train
from .common import (
    COCO_CHECKPOINT_PERIOD,
    DETECTOR,
    base_config,
    base_training,
    box_ap,
    precise_of,
)

CASES = ("base", "learning rate x4", "SGD batch x4")
"""Whose EMA is compared with PreciseBN: with learning rate and batch as published, with four times
the learning rate, and with four times both, for the same epochs."""

SLOW = 0.01
"""The other momentum of the EMA; by default it is 0.1."""

SAMPLES = (32, 64, 128, 256, 512, 1024, 2048)
"""Images that PreciseBN has. The shapes that are trained on are 1000, so that the last number is of
each twice, in other augmentations; of blood cells there are not as many."""


def has_samples(setting: Setting) -> bool:
    """Whether it is asked how many images it takes, and which momentum an EMA."""
    return setting.data != "cells"


def training(setting: Setting, seed: int, case: str) -> Training:
    if case == "base":
        return base_training(setting, seed)
    lr, seconds = setting.pick(0.08, 0.04), setting.pick(410, 0, 800)
    opts: tuple[object, ...] = ("TEST.PRECISE_BN.ENABLED", False, "SOLVER.BASE_LR", lr)
    if case == "learning rate x4":
        opts += ("SOLVER.CHECKPOINT_PERIOD", setting.pick(90, COCO_CHECKPOINT_PERIOD, 100))
        return train(setting, f"{DETECTOR}-lr_x4", base_config(setting), seed, seconds, opts)
    opts += setting.pick(
        (
            *("SOLVER.IMS_PER_BATCH", 32, "SOLVER.MAX_ITER", 225, "SOLVER.WARMUP_ITERS", 75),
            *("SOLVER.CHECKPOINT_PERIOD", 75),
        ),
        (
            *("SOLVER.IMS_PER_BATCH", 64, "SOLVER.MAX_ITER", 67500),
            *("SOLVER.STEPS", "(52500,62500)", "SOLVER.CHECKPOINT_PERIOD", 4500),
        ),
        (
            *("SOLVER.IMS_PER_BATCH", 32, "SOLVER.MAX_ITER", 150, "SOLVER.WARMUP_ITERS", 50),
            *("SOLVER.CHECKPOINT_PERIOD", 50),
        ),
    )
    seconds = setting.pick(365, 0, 760)
    return train(setting, f"{DETECTOR}-batch_x4", base_config(setting), seed, seconds, opts)


def slow_training(setting: Setting, seed: int) -> Training:
    """With the weights of the base training, and another EMA, which is evaluated all along."""
    every = setting.pick(90, 27000)
    saved = setting.pick(900, COCO_CHECKPOINT_PERIOD)
    opts = (
        *("TEST.PRECISE_BN.ENABLED", False, "SOLVER.BN_MOMENTUM", SLOW),
        *("TEST.EVAL_PERIOD", every, "SOLVER.CHECKPOINT_PERIOD", saved),
    )
    return train(setting, f"{DETECTOR}-momentum_{SLOW}", base_config(setting), seed, 470, opts)


def checkpoints(setting: Setting, case: str) -> list[int]:
    """Iterations, counted from 1, of the checkpoints that are looked at."""
    if case == "SGD batch x4":
        return [k * setting.pick(75, 22500, 50) for k in (1, 2, 3)]
    period, number = setting.pick((90, 10), (27000, 10), (100, 6))
    return [k * period for k in range(1, number + 1)]


def progress(setting: Setting, case: str, iteration: int) -> float:
    """The part of the training that is done."""
    return iteration / checkpoints(setting, case)[-1]


def precise_step(of: Training, iteration: int) -> Step:
    return precise_of(of, f"precise-{iteration}", iteration=iteration)


def samples_step(of: Training, images: int) -> Step:
    batch = of.setting.pick(32, 16)
    number, opts = images // batch, ("TEST.PRECISE_BN.IMS_PER_BATCH", batch)
    flags = ("--num-iters", number)
    return recompute(of, f"precise-of_{number}_batches", 19 + 0.65 * number, flags, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for case in CASES:
        of = training(setting, seed, case)
        steps.append(of.step)
        steps += [precise_step(of, iteration) for iteration in checkpoints(setting, case)]
    if not has_samples(setting):
        return steps
    base = training(setting, seed, "base")
    steps += [samples_step(base, images) for images in SAMPLES]
    return [*steps, slow_training(setting, seed).step]


def ap(results: Results, seed: int, case: str, iteration: int, statistics: str) -> float | None:
    """Box AP of a checkpoint with its EMA, "before", or with PreciseBN, "after"."""
    step = precise_step(training(results.setting, seed, case), iteration)
    return box_ap(results, step, "precise.json", "results", statistics)


def gain(results: Results, seed: int, case: str, iteration: int) -> float | None:
    """Box AP of PreciseBN - EMA."""
    after = ap(results, seed, case, iteration, "after")
    return difference(after, ap(results, seed, case, iteration, "before"))


def slow_ap(results: Results, seed: int, iteration: int) -> float | None:
    """Box AP with the EMA of the other momentum."""
    return results.ap_at(slow_training(results.setting, seed), "bbox", iteration)


def error(results: Results, seed: int, case: str, iteration: int) -> float | None:
    """Of an EMA: the mean of both shifts over all layers."""
    errors = layer_errors(results, seed, case, iteration)
    return average(errors) if errors else None


def layer_errors(results: Results, seed: int, case: str, iteration: int) -> list[float]:
    """Of an EMA at a checkpoint, layer by layer; empty where it is not known."""
    step = precise_step(training(results.setting, seed, case), iteration)
    layers = results.at(step, "precise.json", "layers") or []
    shifts = [average((of["mean_shift"], of["var_shift"])) for of in layers]
    return known(shifts)  # an EMA may be infinite


def samples_ap(results: Results, seed: int, images: int) -> float | None:
    """Box AP of the base training's end with PreciseBN of so many images."""
    step = samples_step(training(results.setting, seed, "base"), images)
    return results.ap(step, "precise.json", "results", "after", "bbox")


def precise_early(results: Results, seed: int) -> float | None:
    points = checkpoints(results.setting, "base")
    early = [c for c in points if progress(results.setting, "base", c) <= 1 / 3]
    return average([gain(results, seed, "base", c) for c in early])


def precise_large_rate(results: Results, seed: int) -> float | None:
    case = "learning rate x4"
    return average([gain(results, seed, case, c) for c in checkpoints(results.setting, case)])


def unsteadiness(results: Results, seed: int, case: str, statistics: str) -> float | None:
    """The mean absolute second difference of AP over the checkpoints."""
    points = checkpoints(results.setting, case)
    found = known(ap(results, seed, case, c, statistics) for c in points)
    return average([abs(a - 2 * b + c) for a, b, c in zip(found, found[1:], found[2:])])  # noqa: B905


def precise_steady(results: Results, seed: int) -> float | None:
    case = "learning rate x4"
    ema = unsteadiness(results, seed, case, "before")
    return difference(ema, unsteadiness(results, seed, case, "after"))


def ema_at_the_end(results: Results, seed: int) -> float | None:
    found = gain(results, seed, "base", checkpoints(results.setting, "base")[-1])
    return None if found is None else abs(found)


def error_with_rate(results: Results, seed: int) -> float | None:
    points = checkpoints(results.setting, "base")
    ours = average([error(results, seed, "learning rate x4", c) for c in points])
    base = average([error(results, seed, "base", c) for c in points])
    return difference(ratio(ours, base), 1.0)


def error_with_batch(results: Results, seed: int) -> float | None:
    setting, case = results.setting, "SGD batch x4"
    points = checkpoints(setting, case)
    nearest = [
        min(
            checkpoints(setting, "base"),
            key=lambda c: abs(progress(setting, "base", c) - progress(setting, case, of)),
        )
        for of in points
    ]
    ours = average([error(results, seed, case, c) for c in points])
    base = average([error(results, seed, "base", c) for c in nearest])
    return difference(ratio(ours, base), 1.0)


def a_thousand_samples(results: Results, seed: int) -> float | None:
    return difference(samples_ap(results, seed, 2048), samples_ap(results, seed, 1024))


EFFECTS = {
    "precise early": precise_early,
    "precise steady": precise_steady,
    "precise large rate": precise_large_rate,
    "EMA at the end": ema_at_the_end,
    "EMA error, rate": error_with_rate,
    "EMA error, batch": error_with_batch,
    "a thousand samples": a_thousand_samples,
}


def show(results: Results) -> list[Table | Picture]:
    setting, seed = results.setting, results.seeds[0]
    rows = []
    for case in CASES:
        of = training(setting, seed, case)
        has_slow = case == "base" and has_samples(setting)
        for point in checkpoints(setting, case):
            cells = (
                results.over_seeds(ap, case, point, "before"),
                results.over_seeds(ap, case, point, "after"),
                results.over_seeds(slow_ap, point) if has_slow else [],
                results.over_seeds(error, case, point),
            )
            steps: tuple[Step, ...] = (of.step, precise_step(of, point))
            if has_slow:
                steps += (slow_training(setting, seed).step,)
            rows.append(Row((case, str(point)), cells, steps))
    columns = ("box AP, EMA", "box AP, PreciseBN", f"box AP, EMA, momentum {SLOW}", "EMA's error")
    labels = ("training", "iterations")
    title = "EMA against PreciseBN, the same weights"
    table = Table("ema_precise", title, labels, columns, (1, 1, 1, 3), rows, _NOTE + _ERROR)
    return [
        table,
        *([_samples_table(results)] if has_samples(setting) else []),
        Picture("population", "Box AP over the trainings.", draw(_ap_panels(results), True)),
        Picture("population_error", _ERROR, draw(_error_panels(results))),
    ]


_NOTE = (
    "The other momentum's EMA is of a training of its own, which on a CPU has the same weights. "
)

_ERROR = (
    "The error of an EMA is its shift from PreciseBN's statistics: of means, in standard "
    "deviations, and of variances, relative; the mean of both, over layers."
)


def _samples_table(results: Results) -> Table:
    of = training(results.setting, results.seeds[0], "base")
    rows = [
        Row((str(n),), (results.over_seeds(samples_ap, n),), (of.step, samples_step(of, n)))
        for n in SAMPLES
    ]
    title = "Samples that PreciseBN takes, at the end of the base training"
    return Table("samples", title, ("images",), ("box AP",), (1,), rows)


def _ap_panels(results: Results) -> list[Panel]:
    panels = []
    for case in CASES:
        xs = checkpoints(results.setting, case)
        lines = [
            Line(name, xs, [results.over_seeds(ap, case, x, statistics) for x in xs])
            for name, statistics in (("EMA", "before"), ("PreciseBN", "after"))
        ]
        if case == "base" and has_samples(results.setting):
            ys = [results.over_seeds(slow_ap, x) for x in xs]
            lines.append(Line(f"EMA, momentum {SLOW}", xs, ys))
        panels.append(Panel(case, "iterations", "box AP", lines))
    return panels


def _error_panels(results: Results) -> list[Panel]:
    setting, over, depth = results.setting, [], []
    for case in CASES:
        points = checkpoints(setting, case)
        xs = [progress(setting, case, c) for c in points]
        ys = [results.over_seeds(error, case, c) for c in points]
        over.append(Line(case, xs, ys))
        of_layers = [layer_errors(results, s, case, points[-2]) for s in results.seeds]
        depth.append(by_layer(case, of_layers))
    found = [
        Panel("Error of the EMA", "part of the training", "error", over, "y"),
        Panel("The same before the end, by depth", "layer, from the input on", "error", depth, "y"),
    ]
    if has_samples(setting):
        ys = [results.over_seeds(samples_ap, n) for n in SAMPLES]
        samples = Line("base", SAMPLES, ys)
        found.append(Panel("Samples of PreciseBN", "images", "box AP", [samples], "x"))
    return found
