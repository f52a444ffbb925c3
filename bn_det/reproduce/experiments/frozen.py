"""Section 4: BatchNorm frozen in the last fifth of a training."""

from __future__ import annotations

from ..results import Picture, Results, Row, Table, difference, ratio
from ..steps import Setting, Step, Training, train
from .batch_size import CURVES, SETS, loss_step, precise_images, precise_step
from .batch_size import training as of_size

SIZE = 2
"""Images in a normalization batch."""

KINDS = ("usual", "frozen")


def trainings(setting: Setting, seed: int) -> tuple[Training, Training]:
    """The usual one, and the one that is frozen at the end."""
    usual = of_size(setting, seed, SIZE)
    name = f"{usual.name.removeprefix('train/').removesuffix(f'-seed{seed}')}-frozen"
    if setting.data == "shapes":
        config = ("batch_size", f"NBS_{SIZE}_frozen")
        return usual, train(setting, name, config, seed, 280, processes=2)
    # As many images as those of the usual training's statistics.
    batches = precise_images(setting) // (SIZE * setting.num_gpus)
    opts = ("SOLVER.FREEZE_BN_ITER", 72000, "TEST.PRECISE_BN.NUM_ITER", batches)
    return usual, train(setting, name, ("ways", "BN"), seed, 0, opts)


def measured(setting: Setting, seed: int, kind: str) -> tuple[Training, Step | None]:
    """The "usual" training with PreciseBN's step, or the "frozen" one, which has had PreciseBN."""
    usual, frozen = trainings(setting, seed)
    return (usual, precise_step(usual, SIZE)) if kind == "usual" else (frozen, None)


def plan(setting: Setting, seed: int) -> list[Step]:
    found = []
    for kind in KINDS:
        of, weights = measured(setting, seed, kind)
        found += [of.step, *([weights] if weights else [])]
        found += [loss_step(of, SIZE, data, weights) for data in SETS]
    return found


def losses(results: Results, seed: int, kind: str, data: str, statistics: str) -> float | None:
    """The loss on either set, of the "usual" training (PreciseBN) or the "frozen" one."""
    of, weights = measured(results.setting, seed, kind)
    return results.at(loss_step(of, SIZE, data, weights), "loss.json", statistics, "value")


def ap(results: Results, seed: int, kind: str) -> float | None:
    """Box AP with population statistics: PreciseBN's, or those that were frozen."""
    of, weights = measured(results.setting, seed, kind)
    if weights is None:
        return results.ap(of.step, "results.json", "bbox")
    return results.ap(weights, "precise.json", "results", "after", "bbox")


def frozen_at_the_end(results: Results, seed: int) -> float | None:
    usual = losses(results, seed, "usual", "validation", "population")
    found = difference(usual, losses(results, seed, "frozen", "validation", "population"))
    return ratio(found, usual)


EFFECTS = {"frozen at the end": frozen_at_the_end}


def show(results: Results) -> list[Table | Picture]:
    rows = []
    for kind in KINDS:
        of, weights = measured(results.setting, results.seeds[0], kind)
        steps = [of.step, *([weights] if weights else [])]
        steps += [loss_step(of, SIZE, data, weights) for data in SETS]
        cells = [results.over_seeds(losses, kind, *of_curve) for of_curve in CURVES.values()]
        rows.append(Row((kind,), (*cells, results.over_seeds(ap, kind)), tuple(steps)))
    columns = (*(f"loss, {name}" for name in CURVES), "box AP, population")
    title = f"BatchNorm frozen in the last fifth, normalization batches of {SIZE}"
    note = (
        "Population statistics are PreciseBN's of the final weights, or those that were frozen, "
        "which PreciseBN had made. The frozen training ends with population statistics; 'batch' "
        "shows what it would do with others."
    )
    labels, digits = ("training",), (4, 4, 4, 4, 1)
    return [Table("frozen", title, labels, columns, digits, rows, note)]
