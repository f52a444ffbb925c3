"""What is checked before anything is run. All raise InputError."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from ..commands.cli import host_module
from ..data.coco import builtin_sources, datasets_root
from ..errors import InputError, check_positive
from .looks import Looks
from .published import NUM_GPUS, what_changes
from .registry import SEVERAL_GPUS, experiments_on
from .report import identity, known_identity
from .steps import Setting, Step

_NOT_OPTIONS = {
    "SEED": "--seeds says it",
    "OUTPUT_DIR": "--runs says it",
    "TEST.EVAL_PERIOD": "experiments evaluate their trainings where they look at them",
    "SOLVER.REFERENCE_WORLD_SIZE": "experiments say how many processes a training has",
}
"""Keys that experiments have to themselves."""

_MOST_SEEDS = 1000
"""More are a slip of the finger, and a plan that takes minutes to make."""


def check_arguments(args: argparse.Namespace, names: Sequence[str]) -> None:
    """The command's arguments, for the experiments that they name."""
    for flag, value in (
        ("--seeds", args.seeds),
        ("--num-gpus", args.num_gpus),
        ("--jobs", args.jobs),
    ):
        if value is not None:
            check_positive(flag, value)
    if (args.seeds or 0) > _MOST_SEEDS:
        raise InputError(f"--seeds: {args.seeds} is not accepted; use 1 to {_MOST_SEEDS}")
    if len(args.opts) % 2:
        raise InputError(
            f"{args.opts[-1]}: has no value; the end of the command is KEY VALUE pairs"
        )
    if "normalizer-free" in names and importlib.util.find_spec("timm") is None:
        raise InputError(
            "EXPERIMENT: 'normalizer-free' needs timm's nets, which are not installed; use "
            "pip install 'bn_det[nf]'"
        )
    for key, why in _NOT_OPTIONS.items():
        if key in args.opts[::2]:
            raise InputError(f"{key}: is not accepted; {why}")
    if args.data != "coco":
        if args.num_gpus is not None:
            raise InputError(
                f"--num-gpus: {args.num_gpus} is not accepted with --data {args.data}, whose "
                "trainings are of one or two processes as the experiment says; leave it out"
            )
        if args.data == "cells" and not args.dry_run:
            _check_cells()
        return
    _check_coco_run(args, names)


def check_data(experiment: str, data: str) -> None:
    """Whether there is such an experiment, or "all", on some data."""
    there = experiments_on(data)
    if experiment == "all" or experiment in there:
        return
    raise InputError(
        f"--data: {data!r} is not accepted with {experiment}, which has no images or no settings "
        f"there; {', '.join(there)} have them; use one of these, or --data shapes"
    )


def _check_cells() -> None:
    """Raise InputError unless the photographs are there."""
    if missing := _missing("blood_cells_"):
        raise InputError(
            f"--data: 'cells' is not accepted: there is no {missing}; bn-det prepare-blood-cells "
            "makes it, in the folder that the environment variable DETECTRON2_DATASETS names"
        )


def _missing(prefix: str) -> Path | None:
    """The first file or folder that is not there, of the data sets whose names begin so."""
    for name, source in builtin_sources().items():
        for path in (source.json_file, source.image_root):
            if name.startswith(prefix) and not Path(path).exists():
                return Path(path).absolute()
    return None


def _check_coco_run(args: argparse.Namespace, names: Sequence[str]) -> None:
    """What only --data coco has to have."""
    if not args.dry_run:
        _check_coco()
    if torch.cuda.is_available() and (args.jobs or 1) > 1:
        raise InputError(
            f"--jobs: {args.jobs} is not accepted with --data coco on GPUs: commands would share "
            "the first GPU; leave it out"
        )
    num_gpus, here = args.num_gpus or NUM_GPUS, torch.cuda.device_count()
    several = [name for name in names if name in SEVERAL_GPUS]
    if not args.dry_run and here < num_gpus:
        is_enough = here >= (2 if several else 1)
        less = f"add --num-gpus {here} --yes ({what_changes(here)}), " if is_enough else ""
        raise InputError(
            f"--num-gpus: {num_gpus} is not accepted: this machine has {here} GPUs; use one with "
            f"as many, {less}or --data shapes, which needs none"
        )
    if num_gpus == 1 and several:
        raise InputError(
            f"--num-gpus: 1 is not accepted with {' and '.join(several)}, which compare a GPU's "
            "batch with that of all; use 2 or more"
        )
    if num_gpus != NUM_GPUS:
        changes = f"--num-gpus: {what_changes(num_gpus)}"
        if not (args.yes or args.dry_run):
            raise InputError(f"{changes}. Add --yes to run it so")
        print(changes)


def _check_coco() -> None:
    """Raise InputError unless COCO is where Detectron2 looks for it."""
    if missing := _missing("coco_"):
        raise InputError(
            f"--data: 'coco' is not accepted: there is no {missing}. COCO is looked for below "
            f"{datasets_root().absolute() / 'coco'} (the environment variable DETECTRON2_DATASETS "
            "names the folder above it), as annotations/instances_train2017.json, "
            "annotations/instances_val2017.json, train2017/*.jpg and val2017/*.jpg; or use --data "
            "shapes, which is generated"
        )


def check_host(setting: Setting) -> None:
    """Whether it has the weights that trainings begin with."""
    keys = setting.opts[::2]
    if setting.data == "coco" and setting.host != "detectron2" and "MODEL.WEIGHTS" not in keys:
        raise InputError(
            "--host: 'torchvision' is not accepted with --data coco, whose trainings begin with "
            "Detectron2's ResNet-50; install Detectron2, or end the command with MODEL.WEIGHTS and "
            "a checkpoint of torchvision's, and MODEL.RESNETS.STRIDE_IN_1X1 False"
        )


def check_options(steps: Sequence[Step], setting: Setting) -> None:
    """What the user's KEY VALUE pairs make of the trainings, before the first of them.

    Keys and values have to be a config's, and each checkpoint that is measured has to be saved.
    """
    read_config = host_module(setting.host, "train").read_config
    for training in (step for step in steps if step.is_training):
        solver = read_config(training.config, training.opts).SOLVER
        for of in steps:
            iteration = of.looks_at if training.name in of.needs else None
            if iteration is None:
                continue
            if iteration > solver.MAX_ITER or iteration % solver.CHECKPOINT_PERIOD:
                raise InputError(
                    f"SOLVER.MAX_ITER and SOLVER.CHECKPOINT_PERIOD: {solver.MAX_ITER} and "
                    f"{solver.CHECKPOINT_PERIOD} are not accepted with {training.name}, whose "
                    f"checkpoint of iteration {iteration} is measured, and would not be saved; "
                    "leave out what you have given of them"
                )


def check_folder(folder: Path, title: str, setting: Setting, looks: Looks) -> None:
    """Whether a report may be written over what is there."""
    found, ours = known_identity(folder), identity(title, setting, looks)
    if found is None:
        return
    for key, value in ours.items():
        if found.get(key) != value:
            raise InputError(
                f"--output: {folder} has a report with {key} {found.get(key)!r}, and this is one "
                f"with {value!r}; use another folder"
            )
    if len(found["seeds"]) > looks.seeds[-1]:
        raise InputError(
            f"--output: {folder} has a report of {len(found['seeds'])} seeds, and this is one of "
            f"{looks.seeds[-1]}; use another folder, or --seeds {len(found['seeds'])}"
        )
