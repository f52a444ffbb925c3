"""Section 6: batches of few categories with two samples of each, and groups across categories."""

from __future__ import annotations

from .. import steps
from ..results import Picture, Results, Row, Table, difference, ratio
from ..steps import Setting, Step, Training, train

BATCHES = {"random": 4, "pairs": 4, "random_ghost": 2, "pairs_across": 2}
"""The configs, and the images that each normalizes together."""


def training(setting: Setting, seed: int, batches: str) -> Training:
    return train(setting, f"correlated-{batches}", ("correlated", batches), seed, 360)


def loss_step(of: Training, batches: str) -> Step:
    """The loss on validation images, in batches as those of the training."""
    return steps.measure(of, "loss", "loss", 15, BATCHES[batches])


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for batches in BATCHES:
        of = training(setting, seed, batches)
        found += [of.step, loss_step(of, batches)]
    return found


def losses(results: Results, seed: int, batches: str, statistics: str) -> float | None:
    """The validation loss, with statistics of the "population" or the "batch"."""
    step = loss_step(training(results.setting, seed, batches), batches)
    return results.at(step, "loss.json", statistics, "value")


def ap(results: Results, seed: int, batches: str) -> float | None:
    of = training(results.setting, seed, batches)
    return results.ap(of.step, "results.json", "bbox")


def gap(results: Results, seed: int, batches: str) -> float | None:
    """What batches as in training gain."""
    found = [losses(results, seed, batches, s) for s in ("population", "batch")]
    return difference(*found)


def _more_than(results: Results, seed: int, batches: str, usual: str) -> float | None:
    """By how much the gap is larger than that of any images, relative to their loss."""
    found = difference(gap(results, seed, batches), gap(results, seed, usual))
    return ratio(found, losses(results, seed, usual, "population"))


def pairs_leak(results: Results, seed: int) -> float | None:
    return _more_than(results, seed, "pairs", "random")


def across(results: Results, seed: int) -> float | None:
    remaining = _more_than(results, seed, "pairs_across", "random_ghost")
    return difference(pairs_leak(results, seed), remaining)


EFFECTS = {"pairs leak": pairs_leak, "groups across categories": across}


def show(results: Results) -> list[Table | Picture]:
    rows = []
    for batches, size in BATCHES.items():
        of = training(results.setting, results.seeds[0], batches)
        cells = (
            results.over_seeds(losses, batches, "population"),
            results.over_seeds(losses, batches, "batch"),
            results.over_seeds(gap, batches),
            results.over_seeds(ap, batches),
        )
        rows.append(Row((batches, str(size)), cells, (of.step, loss_step(of, batches))))
    labels = ("batches", "images normalized together")
    columns = ("loss, population", "loss, batch", "population - batch", "box AP, population")
    title = "Batches of two images of each of two categories, and groups across them"
    note = "Losses are of validation images, in batches that are composed as those of the training."
    return [Table("correlated", title, labels, columns, (4, 4, 4, 1), rows, note)]
