"""Blood cells of a laboratory that is not trained on: its own population statistics (AdaBN)."""

from __future__ import annotations

from ..results import Line, Panel, Picture, Results, Row, Table, average, difference, draw
from ..steps import Setting, Step, Training, train
from .common import CELLS_SECONDS, JOINT, LABORATORIES, adabn_of, base_training, cells

NEW = "raabin"
"""The one that the base training leaves out."""

LEFT_OUT = (*LABORATORIES, NEW)

METRICS = {"box AP": "AP", "AP of white cells": "AP-WBC", "AP of red cells": "AP-RBC"}
"""By what they are; platelets are hardly found at all."""


def training(setting: Setting, seed: int, left_out: str) -> Training:
    """On the three other laboratories."""
    if left_out == NEW:
        return base_training(setting, seed)
    others = cells([name for name in LEFT_OUT if name != left_out], "train")
    name = f"retinanet_joint-without_{left_out}"
    return train(setting, name, JOINT, seed, CELLS_SECONDS, ("DATASETS.TRAIN", others))


def adabn_step(of: Training, left_out: str) -> Step:
    return adabn_of(of, left_out, *cells([left_out], "val"))


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for left_out in LEFT_OUT:
        of = training(setting, seed, left_out)
        steps += [of.step, adabn_step(of, left_out)]
    return steps


def ap(results: Results, seed: int, left_out: str, when: str, of: str) -> float | None:
    """One of METRICS in the laboratory that is left out, "before" AdaBN or "after"."""
    step = adabn_step(training(results.setting, seed, left_out), left_out)
    return results.ap(step, "precise.json", "results", when, "bbox", metric=of)


def gain(of: str, results: Results, seed: int) -> float | None:
    """Of AdaBN: mean over the laboratories."""
    return average(
        difference(ap(results, seed, name, "after", of), ap(results, seed, name, "before", of))
        for name in LEFT_OUT
    )


def adabn(results: Results, seed: int) -> float | None:
    return gain("AP", results, seed)


def white_cells(results: Results, seed: int) -> float | None:
    return difference(gain("AP-RBC", results, seed), gain("AP-WBC", results, seed))


EFFECTS = {"AdaBN, laboratories": adabn, "AdaBN, red and white cells": white_cells}


def show(results: Results) -> list[Table | Picture]:
    rows = []
    for name in LEFT_OUT:
        of = training(results.setting, results.seeds[0], name)
        found = tuple(
            results.over_seeds(ap, name, when, metric)
            for metric in METRICS.values()
            for when in ("before", "after")
        )
        rows.append(Row((name,), found, (of.step, adabn_step(of, name))))
    columns = tuple(f"{of}, {ours}" for of in METRICS for ours in ("its own statistics", "AdaBN"))
    title = "The laboratory that is left out of the training"
    panels = [
        Panel(name, "laboratory that is left out", name, _lines(results, of), groups=LEFT_OUT)
        for name, of in METRICS.items()
    ]
    caption = "In each laboratory, by models of the three others."
    return [
        Table("new_laboratory", title, ("left out",), columns, (1,) * len(columns), rows),
        Picture("new_laboratory", caption, draw(panels)),
    ]


def _lines(results: Results, metric: str) -> list[Line]:
    xs = list(range(len(LEFT_OUT)))
    return [
        Line(name, xs, [results.over_seeds(ap, of, when, metric) for of in LEFT_OUT])
        for name, when in (("its own statistics", "before"), ("AdaBN", "after"))
    ]
