"""Tables 3 and 6, Figure 9: what a BN in RoI heads leaks, and two remedies.

On blood cells it is a Faster R-CNN, which has no masks, and AP is that of boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from .. import steps
from ..published import beside
from ..results import Line, Panel, Picture, Results, Row, Table, difference, draw
from ..steps import Setting, Step, Training, train
from .common import COCO_CHECKPOINT_PERIOD, LABORATORIES, box_ap, cells

HEADS = ("BN", "BN_shuffle", "SyncBN")
BATCH = (
    "TEST.BN_STATISTICS", "batch",
    "TEST.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD','ROI_MASK_HEAD']",
)  # fmt: skip

"""At test time, the heads normalize with the statistics of the RoIs of each image."""

CELLS_CONFIG = ("blood_cells", "faster_rcnn_joint")

CELLS = (
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 500),
    *("SOLVER.MAX_ITER", 1500),
)
"""What the trainings on blood cells have as those on shapes, in place of the config's batches of
eight photographs, and of its BN in the backbone, which would leak, too."""


def period(setting: Setting) -> int:
    """Iterations between the looks at a training: three of them."""
    return setting.pick(500, 90000)


def training(setting: Setting, seed: int, head: str) -> Training:
    every = period(setting)
    saved = setting.pick(every, COCO_CHECKPOINT_PERIOD)
    opts: tuple[object, ...]
    opts = ("SOLVER.CHECKPOINT_PERIOD", saved, "TEST.EVAL_PERIOD", every)
    if setting.data != "cells":
        return train(setting, f"mask_rcnn-{head}", ("leakage", f"head_{head}"), seed, 440, opts, 2)
    norm, _, shuffled = head.partition("_")
    opts += (*CELLS, "MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_BOX_HEAD.SHUFFLE", bool(shuffled))
    opts += ("DATASETS.TEST", cells(LABORATORIES, "val"))
    return train(setting, f"faster_rcnn-{head}", CELLS_CONFIG, seed, 700, opts, 2)


def iterations(setting: Setting) -> list[int]:
    return [k * period(setting) for k in (1, 2, 3)]


def leak_step(of: Training, iteration: int) -> Step:
    images = of.setting.pick(1, 2)
    weights = of.checkpoint(iteration)
    return steps.measure(of, "leakage", f"leakage-{iteration}", 15, images, weights=weights)


def batch_step(of: Training, iteration: int) -> Step:
    """AP with the statistics of the RoIs of each test image."""
    return steps.evaluate(of, f"batch-{iteration}", 19, BATCH, weights=of.checkpoint(iteration))


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for head in HEADS:
        of = training(setting, seed, head)
        found.append(of.step)
        for iteration in iterations(setting):
            found += [leak_step(of, iteration), batch_step(of, iteration)]
    return found


def leak(results: Results, seed: int, head: str, iteration: int, metric: str) -> float | None:
    """By how much a metric is larger with batch statistics."""
    step = leak_step(training(results.setting, seed, head), iteration)
    return results.at(step, "leakage.json", "batch - population", metric, "value")


def tasks(setting: Setting) -> tuple[str, ...]:
    """Whose AP is looked at; that of the last one over the training."""
    return setting.pick(("bbox", "segm"), ("bbox", "segm"), ("bbox",))


def population_ap(
    results: Results, seed: int, head: str, iteration: int, task: str
) -> float | None:
    """AP with population statistics, of one of the tasks."""
    return results.ap_at(training(results.setting, seed, head), task, iteration)


def batch_ap(results: Results, seed: int, head: str, iteration: int, task: str) -> float | None:
    """AP with the statistics of the RoIs of a test image."""
    step = batch_step(training(results.setting, seed, head), iteration)
    if task == "bbox":
        return box_ap(results, step, "results.json")
    return results.ap(step, "results.json", task)


def seconds(results: Results, seed: int, head: str) -> float | None:
    """Of an iteration, the median."""
    lines = results.metrics(training(results.setting, seed, head))
    times = [line["time"] for line in lines if "time" in line]
    return median(times) if times else None


FOREGROUND = "foreground accuracy"


def last(results: Results) -> int:
    return iterations(results.setting)[-1]


def leak_effect(results: Results, seed: int) -> float | None:
    return leak(results, seed, "BN", last(results), FOREGROUND)


def ap_effect(task: str) -> Callable[[Results, int], float | None]:
    def effect(results: Results, seed: int) -> float | None:
        of = (results, seed, "BN", last(results), task)
        return difference(batch_ap(*of), population_ap(*of))

    return effect


def closed_by(head: str) -> Callable[[Results, int], float | None]:
    def effect(results: Results, seed: int) -> float | None:
        remaining = leak(results, seed, head, last(results), FOREGROUND)
        return difference(leak_effect(results, seed), remaining)

    return effect


EFFECTS = {
    "leak": leak_effect,
    "leak, mask AP": ap_effect("segm"),
    "leak, box AP": ap_effect("bbox"),
    "shuffling": closed_by("BN_shuffle"),
    "SyncBN": closed_by("SyncBN"),
}


def show(results: Results) -> list[Table | Picture]:
    end, rows, shown = last(results), [], tasks(results.setting)
    for head in HEADS:
        of = training(results.setting, results.seeds[0], head)
        values = (
            *(results.over_seeds(ap, head, end, task) for task in shown for ap in _APS.values()),
            results.over_seeds(leak, head, end, FOREGROUND),
            results.over_seeds(leak, head, end, "loss"),
            results.over_seeds(seconds, head),
        )
        rows.append(Row((head,), values, (of.step, leak_step(of, end), batch_step(of, end))))
    columns = (
        *(f"{_NAMES[task]}, {statistics}" for task in shown for statistics in _APS),
        *("foreground accuracy, batch - population", "loss, batch - population"),
        "seconds an iteration",
    )
    digits = (*(1 for _ in range(2 * len(shown))), 2, 4, 3)
    title = "Norms of the RoI heads (Tables 3 and 6)"
    note = beside(results.setting.data, "Tables 3 and 6")
    table = Table("table6", title, ("head",), columns, digits, rows, note)
    return [table, Picture("leakage", "Over the training (Figure 9).", draw(_panels(results)))]


_APS = {"population": population_ap, "batch": batch_ap}

_NAMES = {"bbox": "box AP", "segm": "mask AP"}


def _panels(results: Results) -> list[Panel]:
    xs, task = iterations(results.setting), tasks(results.setting)[-1]
    aps, leaks = [], []
    for head in HEADS:
        for name, of in _APS.items():
            ys = [results.over_seeds(of, head, x, task) for x in xs]
            aps.append(Line(f"{head}, {name}", xs, ys, head, name == "batch"))
        ys = [results.over_seeds(leak, head, x, FOREGROUND) for x in xs]
        leaks.append(Line(head, xs, ys))
    title = "What the box head reads from its batch"
    return [
        Panel("Average precision", "iterations", _NAMES[task], aps),
        Panel(title, "iterations", f"{FOREGROUND}, batch - population", leaks),
    ]
