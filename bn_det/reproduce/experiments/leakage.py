"""Tables 3 and 6, Figure 9: what a BN in RoI heads leaks, and two remedies."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from .. import steps
from ..results import Line, Panel, Picture, Results, Row, Table, difference, draw
from ..steps import Setting, Step, Training, train
from .common import COCO_CHECKPOINT_PERIOD

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
    saved = setting.pick(every, COCO_CHECKPOINT_PERIOD)
    opts = ("SOLVER.CHECKPOINT_PERIOD", saved, "TEST.EVAL_PERIOD", every)
    return train(setting, f"mask_rcnn-{head}", ("leakage", f"head_{head}"), seed, 440, opts, 2)


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


def population_ap(
    results: Results, seed: int, head: str, iteration: int, task: str
) -> float | None:
    """AP with population statistics, of "bbox" or "segm"."""
    return results.ap_at(training(results.setting, seed, head), task, iteration)


def batch_ap(results: Results, seed: int, head: str, iteration: int, task: str) -> float | None:
    """AP with the statistics of the RoIs of a test image."""
    step = batch_step(training(results.setting, seed, head), iteration)
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


def mask_effect(results: Results, seed: int) -> float | None:
    end = last(results)
    return difference(
        batch_ap(results, seed, "BN", end, "segm"), population_ap(results, seed, "BN", end, "segm")
    )


def closed_by(head: str) -> Callable[[Results, int], float | None]:
    def effect(results: Results, seed: int) -> float | None:
        remaining = leak(results, seed, head, last(results), FOREGROUND)
        return difference(leak_effect(results, seed), remaining)

    return effect


EFFECTS = {
    "leak": leak_effect,
    "leak, mask AP": mask_effect,
    "shuffling": closed_by("BN_shuffle"),
    "SyncBN": closed_by("SyncBN"),
}


def show(results: Results) -> list[Table | Picture]:
    end, rows = last(results), []
    for head in HEADS:
        of = training(results.setting, results.seeds[0], head)
        cells = (
            results.over_seeds(population_ap, head, end, "bbox"),
            results.over_seeds(batch_ap, head, end, "bbox"),
            results.over_seeds(population_ap, head, end, "segm"),
            results.over_seeds(batch_ap, head, end, "segm"),
            results.over_seeds(leak, head, end, FOREGROUND),
            results.over_seeds(leak, head, end, "loss"),
            results.over_seeds(seconds, head),
        )
        rows.append(Row((head,), cells, (of.step, leak_step(of, end), batch_step(of, end))))
    columns = (
        *("box AP, population", "box AP, batch", "mask AP, population", "mask AP, batch"),
        *("foreground accuracy, batch - population", "loss, batch - population"),
        "seconds an iteration",
    )
    title = "Norms of the RoI heads (Tables 3 and 6)"
    table = Table("table6", title, ("head",), columns, (1, 1, 1, 1, 2, 4, 3), rows)
    return [table, Picture("leakage", "Over the training (Figure 9).", draw(_panels(results)))]


def _panels(results: Results) -> list[Panel]:
    xs = iterations(results.setting)
    lines: dict[str, list[Line]] = {"mask AP": [], FOREGROUND: []}
    for head in HEADS:
        for name, of in (("population", population_ap), ("batch", batch_ap)):
            ys = [results.over_seeds(of, head, x, "segm") for x in xs]
            lines["mask AP"].append(Line(f"{head}, {name}", xs, ys, head, name == "batch"))
        ys = [results.over_seeds(leak, head, x, FOREGROUND) for x in xs]
        lines[FOREGROUND].append(Line(head, xs, ys))
    title = "What the box head reads from its batch"
    return [
        Panel("Average precision", "iterations", "mask AP", lines["mask AP"]),
        Panel(title, "iterations", f"{FOREGROUND}, batch - population", lines[FOREGROUND]),
    ]
