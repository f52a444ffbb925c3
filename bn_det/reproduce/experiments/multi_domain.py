"""Table 5: whose samples normalize a RetinaNet head's levels, and whose statistics are kept."""

from __future__ import annotations

from collections.abc import Callable

from ..published import beside
from ..results import Line, Panel, Picture, Results, Row, Table, draw, known
from ..steps import Setting, Step, Training, train
from .common import DETECTOR, base_training, precise_of

SHARING = ("shared", "per_domain")


def training(setting: Setting, seed: int, statistics: str, affine: str) -> Training:
    """One training for every population choice: these do not touch the weights."""
    if (statistics, affine) == ("per_domain", "shared"):
        return base_training(setting, seed)
    opts = ("MODEL.RETINANET.BN.AFFINE", affine, "TEST.PRECISE_BN.ENABLED", False)
    name = f"{DETECTOR}-{statistics}-affine_{affine}"
    config = ("multi_domain", f"{statistics}-{statistics}-shared")
    return train(setting, name, config, seed, 430, opts)


def population_step(of: Training, population: str) -> Step:
    return precise_of(of, f"precise-{population}", ("--population", population))


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for affine in SHARING:
        for statistics in SHARING:
            of = training(setting, seed, statistics, affine)
            steps += [of.step, *(population_step(of, population) for population in SHARING)]
    return steps


def ap(results: Results, seed: int, statistics: str, affine: str, population: str) -> float | None:
    """Box AP with PreciseBN."""
    step = population_step(training(results.setting, seed, statistics, affine), population)
    return results.ap(step, "precise.json", "results", "after", "bbox")


def ema_ap(results: Results, seed: int, statistics: str, affine: str) -> float | None:
    """Box AP with the training's own EMAs, of the population choice that is consistent with it."""
    of = training(results.setting, seed, statistics, affine)
    return results.ap(of.step, "results.json", "bbox")


def consistency(affine: str) -> Callable[[Results, int], float | None]:
    """The worse consistent choice against the better inconsistent one."""

    def effect(results: Results, seed: int) -> float | None:
        consistent = known(ap(results, seed, s, affine, s) for s in SHARING)
        others = known(ap(results, seed, s, affine, p) for s in SHARING for p in SHARING if s != p)
        return min(consistent) - max(others) if consistent and others else None

    return effect


EFFECTS = {
    "consistent, shared affine": consistency("shared"),
    "consistent, affine per level": consistency("per_domain"),
}

ROWS = {
    ("shared", "shared"): "1",
    ("shared", "per_domain"): "2",
    ("per_domain", "shared"): "3",
    ("per_domain", "per_domain"): "4",
}
"""Of the paper's Table 5, by training and population, with a shared affine."""


def show(results: Results) -> list[Table | Picture]:
    table, lines = [], []
    for affine in SHARING:
        ys = []
        for statistics, population in ROWS:
            values = results.over_seeds(ap, statistics, affine, population)
            ema = results.over_seeds(ema_ap, statistics, affine)
            of = training(results.setting, results.seeds[0], statistics, affine)
            row = ROWS[statistics, population] if affine == "shared" else "-"
            cells = (values, ema if statistics == population else [None] * len(ema))
            label = (row, statistics, population, affine)
            table.append(Row(label, cells, (of.step, population_step(of, population))))
            ys.append(values)
        lines.append(Line(f"affine {affine}", [0, 1, 2, 3], ys))
    labels = ("row of Table 5", "normalized in training", "population statistics", "affine")
    columns = ("box AP, PreciseBN", "box AP, EMA")
    title = "Levels of the head: consistent first and last"
    groups = [f"{s},\n{p}" for s, p in ROWS]
    panel = Panel(title, "normalized in training, population", "box AP", lines, groups=groups)
    name, note = "Levels of a RetinaNet head (Table 5)", beside(results.setting.data, "Table 5")
    return [
        Table("table5", name, labels, columns, (1, 1), table, note),
        Picture("multi_domain", "Box AP of the four choices, with PreciseBN.", draw([panel])),
    ]
