"""The published setting on COCO, and what another number of GPUs changes of it."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..config.keys import leaves
from ..config.packaged import find_config
from ..config.yaml_file import load_yaml

NUM_GPUS = 8

_DEFAULTS = {
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "TEST.EVAL_PERIOD": 0,
    "SOLVER.FREEZE_BN_ITER": 0,
}
"""Detectron2's, and ours, of what is scaled and not in every file."""


def beside(data: str, tables: str) -> str:
    """For a note: where the paper's numbers are, to compare with those of COCO."""
    if data != "coco":
        return ""
    return (
        f"The published numbers are those of {tables} of arXiv 2105.07576. They are not repeated "
        "here: its text was not at hand where this was written. "
    )


def scaled(file: str, opts: Sequence[str], num_gpus: int) -> tuple[str, ...]:
    """Options for a training of a COCO config on another number of GPUs than 8.

    Each GPU keeps its images, so that BN of each process stays as it is; the learning rate is
    scaled linearly with the images of a step (Goyal et al. 2017), the iterations by as much, so
    that epochs stay the same.
    """
    if num_gpus == NUM_GPUS:
        return ()
    factor, values = num_gpus / NUM_GPUS, {**_DEFAULTS, **_values(file)}
    values.update(zip(opts[::2], map(decoded, opts[1::2]), strict=True))
    changed: dict[str, Any] = {
        "SOLVER.IMS_PER_BATCH": round(values["SOLVER.IMS_PER_BATCH"] * factor),
        "SOLVER.BASE_LR": values["SOLVER.BASE_LR"] * factor,
        "SOLVER.STEPS": tuple(scaled_iterations(s, num_gpus) for s in values["SOLVER.STEPS"]),
    }
    for key in ("SOLVER.MAX_ITER", *_DEFAULTS):
        changed[key] = scaled_iterations(values[key], num_gpus)
    return tuple(text for key, value in changed.items() for text in (key, str(value)))


def scaled_iterations(published: int, num_gpus: int) -> int:
    """A number of iterations on 8 GPUs, on another number of them.

    Multiples of 4500, as periods and what is looked at are, stay multiples of the same number, so
    that the checkpoints that are looked at are among those that are saved.
    """
    many, rest = divmod(published, 4500)
    return many * (4500 * NUM_GPUS // num_gpus) + round(rest * NUM_GPUS / num_gpus)


@cache
def _values(file: str) -> dict[str, Any]:
    """As file_values, read once: a plan asks for each training of a file."""
    return {key: decoded(value) for key, value in file_values(file).items()}


def file_values(file: str) -> dict[str, Any]:
    """What a config file and its bases set, by key."""
    return dict(sorted(leaves(load_yaml(find_config(file)))))


def decoded(value: Any) -> Any:
    """As yacs reads what YAML has left a text, a tuple for example."""
    try:
        return literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        return value


def what_changes(num_gpus: int) -> str:
    """For a user to agree to."""
    factor = num_gpus / NUM_GPUS
    return (
        f"the published setting is {NUM_GPUS} GPUs with 2 images each. With "
        f"{num_gpus}: {2 * num_gpus} images a step instead of 16; the learning rate is scaled by "
        f"{factor:g}, and iterations, steps and periods by {1 / factor:g}. BN stays "
        f"one of 2 images, but the batches of SyncBN and of shuffling are of {2 * num_gpus} images "
        "instead of 16"
    )
