"""Blood cells of three laboratories: one set of statistics for all, or one for each."""

from __future__ import annotations

from ..results import Line, Panel, Picture, Results, Row, Table, difference, draw
from ..steps import Setting, Step, Training, train
from .common import CELLS_SECONDS, base_training, box_ap, precise_of

FOR_EACH = ("blood_cells", "retinanet_per_laboratory")

WAYS = (("one", "one"), ("one", "each"), ("each", "each"), ("levels", "levels"))
"""What normalizes in training, and whose population statistics: one set for all laboratories, each
laboratory's own, or those of each level of the head, for all laboratories.

Weights that were trained by each laboratory's statistics are not tested by one set for all, as the
layers of both have other statistics in their files.
"""


def training(setting: Setting, seed: int, statistics: str) -> Training:
    if statistics == "one":
        return base_training(setting, seed)
    name = {"each": FOR_EACH[1], "levels": "retinanet_per_level"}[statistics]
    return train(setting, name, (FOR_EACH[0], name), seed, CELLS_SECONDS)


def population_step(setting: Setting, seed: int, statistics: str, population: str) -> Step:
    """PreciseBN of a training's end."""
    of = training(setting, seed, statistics)
    if (statistics, population) == ("one", "each"):
        of = of._replace(config=setting.config(*FOR_EACH))
    return precise_of(of, f"precise-{population}")


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for statistics, population in WAYS:
        steps.append(training(setting, seed, statistics).step)
        steps.append(population_step(setting, seed, statistics, population))
    return list(dict.fromkeys(steps))


def ap(results: Results, seed: int, statistics: str, population: str, when: str) -> float | None:
    """Box AP with PreciseBN, "after", or with what the checkpoint has, "before"."""
    step = population_step(results.setting, seed, statistics, population)
    return box_ap(results, step, "precise.json", "results", when)


def precise(results: Results, seed: int, statistics: str, population: str) -> float | None:
    return ap(results, seed, statistics, population, "after")


def consistent(results: Results, seed: int) -> float | None:
    return difference(precise(results, seed, "one", "one"), precise(results, seed, "one", "each"))


def for_each(results: Results, seed: int) -> float | None:
    return difference(precise(results, seed, "each", "each"), precise(results, seed, "one", "one"))


def levels(results: Results, seed: int) -> float | None:
    both = (precise(results, seed, "levels", "levels"), precise(results, seed, "one", "one"))
    found = difference(*both)
    return None if found is None else abs(found)


EFFECTS = {
    "consistent, laboratories": consistent,
    "statistics for each laboratory": for_each,
    "levels of the head, laboratories": levels,
}


def show(results: Results) -> list[Table | Picture]:
    setting, seed, rows, ys = results.setting, results.seeds[0], [], []
    for way in WAYS:
        values = results.over_seeds(precise, *way)
        is_own = way != ("one", "each")  # elsewhere the EMA is of the other laboratories, too
        ema = results.over_seeds(ap, *way, "before") if is_own else []
        steps = training(setting, seed, way[0]).step, population_step(setting, seed, *way)
        rows.append(Row(way, (values, ema), steps))
        ys.append(values)
    columns = ("box AP, PreciseBN", "box AP, EMA")
    labels = ("normalized in training", "population statistics")
    title = "Statistics of laboratories, and of levels"
    groups = [f"{s},\n{p}" for s, p in WAYS]
    line = Line("mean over laboratories", list(range(len(WAYS))), ys)
    panel = Panel(title, "normalized in training, population", "box AP", [line], groups=groups)
    caption = "Box AP with PreciseBN, of the laboratories that were trained on."
    return [
        Table("laboratories", title, labels, columns, (1, 1), rows),
        Picture("laboratories", caption, draw([panel])),
    ]
