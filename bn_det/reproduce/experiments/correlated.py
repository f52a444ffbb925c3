"""Section 6: batches of few categories with two samples of each, and groups across categories."""

from __future__ import annotations

from .. import steps
from ..results import Picture, Results, Row, Table, difference, ratio
from ..steps import Setting, Step, Training, train

BATCHES = {"random": 4, "pairs": 4, "random_ghost": 2, "pairs_across": 2}
"""The configs, and the images that each normalizes together."""

OTHER = {"random": "pairs", "pairs": "random",
         "random_ghost": "pairs_across", "pairs_across": "random_ghost"}  # fmt: skip
"""Whose batches have as many images, and are of any images where a config's are not."""


def training(setting: Setting, seed: int, batches: str) -> Training:
    return train(setting, f"correlated-{batches}", ("correlated", batches), seed, 360)


def loss_step(of: Training, batches: str, measured: str) -> Step:
    """The loss on validation images, in batches as those of one of the trainings."""
    if measured == batches:
        return steps.measure(of, "loss", "loss", 15, BATCHES[batches])
    opts = ("DATALOADER.CATEGORIES_PER_BATCH", 2 if measured.startswith("pairs") else 0)
    return steps.measure(of, "loss", f"loss-{measured}", 15, BATCHES[batches], opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for batches in BATCHES:
        of = training(setting, seed, batches)
        found += [of.step, *(loss_step(of, batches, m) for m in (batches, OTHER[batches]))]
    return found


def losses(
    results: Results, seed: int, batches: str, statistics: str, measured: str | None = None
) -> float | None:
    """The validation loss, with statistics of the "population" or the "batch".

    Args:
        batches: of the training.
        measured: the batches of the measure; as in training if it is None.
    """
    step = loss_step(training(results.setting, seed, batches), batches, measured or batches)
    return results.at(step, "loss.json", statistics, "value")


def ap(results: Results, seed: int, batches: str) -> float | None:
    of = training(results.setting, seed, batches)
    return results.ap(of.step, "results.json", "bbox")


def gap(results: Results, seed: int, batches: str, measured: str | None = None) -> float | None:
    """What batches gain, those of the training or others."""
    found = [losses(results, seed, batches, s, measured) for s in ("population", "batch")]
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
        for measured in (batches, OTHER[batches]):
            cells = (
                results.over_seeds(losses, batches, "population", measured),
                results.over_seeds(losses, batches, "batch", measured),
                results.over_seeds(gap, batches, measured),
                results.over_seeds(ap, batches) if measured == batches else [],
            )
            row_steps = (of.step, loss_step(of, batches, measured))
            rows.append(Row((batches, str(size), measured), cells, row_steps))
    labels = ("trained on batches", "images normalized together", "measured on batches")
    columns = ("loss, population", "loss, batch", "population - batch", "box AP, population")
    title = "Batches of two images of each of two categories, and groups across them"
    note = (
        "Losses are of validation images. What one training gains on batches that another gains as "
        "much on is of those batches, and has not been learned from them."
    )
    return [Table("correlated", title, labels, columns, (4, 4, 4, 1), rows, note)]
