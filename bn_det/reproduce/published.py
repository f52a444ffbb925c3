"""The published setting on COCO, and what fewer GPUs change of it."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ..data.coco import builtin_sources, datasets_root
from ..errors import InputError

NUM_GPUS = 8

_DEFAULTS = {
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "TEST.EVAL_PERIOD": 0,
    "SOLVER.FREEZE_BN_ITER": 0,
}
"""Detectron2's, and ours, of what is scaled and not in every file."""


def scaled(file: str, opts: Sequence[str], num_gpus: int) -> tuple[str, ...]:
    """Options for a training of a COCO config on another number of GPUs than 8.

    Each GPU keeps its images, so that BN of each process stays as it is; the learning rate is
    scaled linearly with the images of a step (Goyal et al. 2017), the iterations by as much, so
    that epochs stay the same.
    """
    if num_gpus == NUM_GPUS:
        return ()
    factor, values = num_gpus / NUM_GPUS, {**_DEFAULTS, **_values(file)}
    values.update(zip(opts[::2], map(_decoded, opts[1::2]), strict=True))
    changed: dict[str, Any] = {
        "SOLVER.IMS_PER_BATCH": round(values["SOLVER.IMS_PER_BATCH"] * factor),
        "SOLVER.BASE_LR": values["SOLVER.BASE_LR"] * factor,
        "SOLVER.STEPS": tuple(round(s / factor) for s in values["SOLVER.STEPS"]),
    }
    for key in ("SOLVER.MAX_ITER", *_DEFAULTS):
        changed[key] = round(values[key] / factor)
    return tuple(text for key, value in changed.items() for text in (key, str(value)))


@cache
def _values(file: str) -> dict[str, Any]:
    """What a file and its bases set below SOLVER and TEST, by key."""
    node = CfgNode.load_yaml_with_base(file)
    found = {}
    for part in ("SOLVER", "TEST"):
        found.update({f"{part}.{key}": _decoded(v) for key, v in node.get(part, {}).items()})
    return found


def _decoded(value: Any) -> Any:
    """As yacs reads what YAML has left a text, a tuple for example."""
    try:
        return literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        return value


def what_changes(num_gpus: int) -> str:
    """For a user to agree to."""
    factor = num_gpus / NUM_GPUS
    return (
        f"--num-gpus: the published setting is {NUM_GPUS} GPUs with 2 images each. With "
        f"{num_gpus}: {2 * num_gpus} images a step instead of 16; the learning rate is scaled by "
        f"{factor:g}, and iterations, steps and periods by {1 / factor:g}. BN stays "
        f"one of 2 images, but the batches of SyncBN and of shuffling are of {2 * num_gpus} images "
        "instead of 16"
    )


def check_coco() -> None:
    """Raise InputError unless COCO is where Detectron2 looks for it."""
    for name, source in builtin_sources().items():
        if not name.startswith("coco_"):
            continue
        for path in (source.json_file, source.image_root):
            if not Path(path).exists():
                raise InputError(
                    f"--data: 'coco' is not accepted: there is no {path}. COCO is looked for below "
                    f"{datasets_root() / 'coco'} (the environment variable DETECTRON2_DATASETS "
                    "names the folder above it), as annotations/instances_train2017.json, "
                    "annotations/instances_val2017.json, train2017/*.jpg and val2017/*.jpg; or use "
                    "--data shapes, which is generated"
                )
