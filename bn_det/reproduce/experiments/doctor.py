"""Whether the gain that the doctor expects of recomputed statistics is the one that comes."""

from __future__ import annotations

from ..results import Line, Panel, Picture, Results, Row, Table, average, difference, draw
from ..steps import Setting, Step, examine
from . import population
from .common import LABORATORIES, base_training, cells


def checkpoints(setting: Setting) -> list[int]:
    """Of the base training: those of its first third, in which an EMA lags behind, and the last."""
    points = population.checkpoints(setting, "base")
    return [c for c in points if population.progress(setting, "base", c) <= 1 / 3] + points[-1:]


def doctor_step(setting: Setting, seed: int, iteration: int) -> Step:
    of = base_training(setting, seed)
    opts = ("DATASETS.TEST", cells(LABORATORIES, "val")) if setting.data == "cells" else ()
    seconds = setting.pick(120, 0, 300)
    return examine(of, f"doctor-{iteration}", seconds, opts, of.checkpoint(iteration))


def came_step(setting: Setting, seed: int, iteration: int) -> Step:
    return population.precise_step(base_training(setting, seed), iteration)


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = [base_training(setting, seed).step]
    for iteration in checkpoints(setting):
        steps += [doctor_step(setting, seed, iteration), came_step(setting, seed, iteration)]
    return steps


def expected(results: Results, seed: int, iteration: int) -> float | None:
    """Box AP that recomputed statistics gain in the doctor's examination."""
    tried = results.at(doctor_step(results.setting, seed, iteration), "doctor.json", "tried")
    # Where nothing is detected, before and after, both are None.
    return None if tried is None else (tried[0]["after"] or 0.0) - (tried[0]["before"] or 0.0)


def came(results: Results, seed: int, iteration: int) -> float | None:
    """Box AP that PreciseBN gains."""
    return population.gain(results, seed, "base", iteration)


def off(results: Results, seed: int) -> float | None:
    """How far the gain that came is from the expected one, mean over the checkpoints."""
    differences = [
        difference(came(results, seed, c), expected(results, seed, c))
        for c in checkpoints(results.setting)
    ]
    return average(None if of is None else abs(of) for of in differences)


EFFECTS = {"expected gain": off}


def show(results: Results) -> list[Table | Picture]:
    setting, seed, points = results.setting, results.seeds[0], checkpoints(results.setting)
    of = base_training(setting, seed).step
    gains = {"expected by the doctor": expected, "with PreciseBN": came}
    rows = []
    for point in points:
        values = tuple(results.over_seeds(gain, point) for gain in gains.values())
        steps = (of, doctor_step(setting, seed, point), came_step(setting, seed, point))
        rows.append(Row((str(point),), values, steps))
    lines = [Line(name, points, [row.cells[k] for row in rows]) for k, name in enumerate(gains)]
    title = "What recomputed statistics gain, as expected and as it came"
    panel = Panel("Recomputed statistics", "iterations", "gain of box AP", lines)
    return [
        Table("expected_gain", title, ("iterations",), tuple(gains), (2, 2), rows),
        Picture("expected_gain", "Of checkpoints of the base training.", draw([panel])),
    ]
