"""What a loss spike right after a warm-up that is too steep costs.

With a head's levels normalized together, where it leaps, and each by itself, at the same rate.
"""

from __future__ import annotations

from ..results import Picture, Results, Row, Table, difference
from ..steps import Setting, Step, Training, train
from . import multi_domain
from .common import DETECTOR

OPTS = ("SOLVER.BASE_LR", 0.16, "SOLVER.WARMUP_ITERS", 50)
"""With these the loss of levels that are normalized together leaps."""


def training(setting: Setting, seed: int, statistics: str, is_steep: bool) -> Training:
    if not is_steep:
        return multi_domain.training(setting, seed, statistics, "shared")
    config = ("multi_domain", f"{statistics}-{statistics}-shared")
    opts = ("TEST.PRECISE_BN.ENABLED", False, *OPTS)
    return train(setting, f"{DETECTOR}-{statistics}-steep", config, seed, 430, opts)


def precise_step(setting: Setting, seed: int, statistics: str, is_steep: bool) -> Step:
    return multi_domain.population_step(training(setting, seed, statistics, is_steep), statistics)


def plan(setting: Setting, seed: int) -> list[Step]:
    steps = []
    for statistics in multi_domain.SHARING:
        for is_steep in (False, True):
            of = training(setting, seed, statistics, is_steep)
            steps += [of.step, precise_step(setting, seed, statistics, is_steep)]
    return steps


def ap(results: Results, seed: int, statistics: str, is_steep: bool) -> float | None:
    """Box AP at the end with PreciseBN; 0 of a training that diverged."""
    if results.diverged(training(results.setting, seed, statistics, is_steep).name):
        return 0.0
    step = precise_step(results.setting, seed, statistics, is_steep)
    return results.ap(step, "precise.json", "results", "after", "bbox")


def largest(results: Results, seed: int, statistics: str, is_steep: bool) -> float | None:
    """Of the loss after the warm-up over its running median."""
    of = training(results.setting, seed, statistics, is_steep)
    most = results.spikes(of.name)["largest"]
    return most["ratio"] if most else None


def cost(results: Results, seed: int, statistics: str) -> float | None:
    """Of the rate, in AP."""
    return difference(*(ap(results, seed, statistics, is_steep) for is_steep in (False, True)))


def shared_costs_more(results: Results, seed: int) -> float | None:
    """None where levels that are normalized together did not leap, or a usual training did."""
    leapt = [
        results.leapt(training(results.setting, seed, statistics, is_steep).name)
        for statistics, is_steep in (("shared", True), ("shared", False), ("per_domain", False))
    ]
    if leapt != [True, False, False]:
        return None
    return difference(*(cost(results, seed, statistics) for statistics in multi_domain.SHARING))


EFFECTS = {"loss spike, shared statistics": shared_costs_more}


def show(results: Results) -> list[Table | Picture]:
    rows = []
    for statistics in multi_domain.SHARING:
        for is_steep, rate in ((False, "usual"), (True, "steep")):
            way = (statistics, is_steep)
            of = training(results.setting, results.seeds[0], *way)
            values = results.over_seeds(largest, *way), results.over_seeds(ap, *way)
            steps = of.step, precise_step(results.setting, results.seeds[0], *way)
            rows.append(Row((statistics, rate), values, steps))
    labels = ("statistics of the head's levels", "warm-up and rate")
    columns = ("largest loss over its median", "box AP, PreciseBN")
    title = "A warm-up of 50 iterations to eight times the rate"
    return [Table("loss_spike", title, labels, columns, (1, 1), rows)]
