"""The commands that an experiment is made of."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .published import scaled, scaled_iterations

T = TypeVar("T")

DATA = ("coco", "shapes", "cells")

CHECKPOINT = "model_final.pth"

_SAVED = re.compile(r"/model_(\d{7})\.pth$")
"""Checkpoints by their iterations, counted from 0."""

_BN_DET = ("-m", "bn_det")


class Step(NamedTuple):
    """A command of ours, whose results lie in a folder.

    Attributes:
        name: of the folder, below that of all runs; "train/NAME" for a training, and for a
            measurement of its checkpoint below that. Steps of the same name are the same.
        command: arguments of Python, with which it runs a command of ours.
        seconds: about how long it takes on two CPU cores; of one process, beside another one. 0
            if it is not known, as on COCO.
        needs: names of the steps that have to be done before.
        processes: how many it starts.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    processes: int = 1

    @property
    def is_training(self) -> bool:
        return self.command[2:3] == ("train",) and "--eval-only" not in self.command

    @property
    def config(self) -> str:
        """The file of its config, as its command names it."""
        return self.command[self.command.index("--config-file") + 1]

    @property
    def opts(self) -> tuple[str, ...]:
        """KEY VALUE pairs of a training, which follow its file and its number of processes."""
        rest = self.command[self.command.index("--config-file") + 2 :]
        return rest[2:] if rest[:1] == ("--num-gpus",) else rest

    @property
    def looks_at(self) -> int | None:
        """The iteration whose checkpoint it reads; None where that is of the end, or none."""
        files = dict(pairwise(self.command))  # the last value of a key counts
        found = _SAVED.search(files.get("--weights") or files.get("MODEL.WEIGHTS", ""))
        return int(found[1]) + 1 if found else None


def estimate(steps: Iterable[Step], jobs: int) -> timedelta:
    """About how long steps take on two CPU cores, so many processes at a time."""
    steps = list(steps)
    together = sum(step.seconds * min(step.processes, jobs) / jobs for step in steps)
    longest = max((step.seconds for step in steps), default=0.0)
    return timedelta(seconds=round(max(together, longest)))


def training_of(name: str) -> str:
    """The name of the training that a step is, or is a measurement of."""
    return "/".join(name.split("/")[:2])


class Setting(NamedTuple):
    """What all steps of a report have in common.

    Attributes:
        data: one of DATA.
        host: "detectron2" or "torchvision".
        runs: the folder of all runs.
        num_gpus: processes of a training on COCO.
        opts: KEY VALUE pairs at the end of every command.
    """

    data: str
    host: str
    runs: Path
    num_gpus: int = 8
    opts: tuple[str, ...] = ()

    def pick(self, shapes: T, coco: T, cells: T | None = None) -> T:
        """One of the values, by the data; that of shapes for cells, unless they have their own."""
        small = cells if self.data == "cells" and cells is not None else shapes
        return coco if self.data == "coco" else small

    @property
    def is_small(self) -> bool:
        """Whether trainings are for two CPU cores, and their time is known."""
        return self.data != "coco"

    def folder(self, name: str) -> str:
        """Of a step, as a command names it."""
        return relative(self.runs / name)

    def config(self, folder: str, name: str) -> str:
        """A packaged config file, as a command names it wherever it is typed."""
        twin = self.pick("shapes", "", "small")
        return (Path("configs") / folder / twin / f"{name}.yaml").as_posix()

    def tool(self, name: str) -> tuple[str, ...]:
        return (*_BN_DET, name, "--host", self.host)


def relative(path: Path) -> str:
    """A path as a user would type it: from here, if it is below."""
    found = os.path.relpath(path)
    return str(path.absolute()) if found.startswith("..") else found


class Training(NamedTuple):
    """A training that measurements refer to."""

    step: Step
    setting: Setting
    config: str
    opts: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.step.name

    def iteration(self, published: int) -> int:
        """That of a number of iterations of the published setting; both are counted from 1."""
        if self.setting.is_small:
            return published
        return scaled_iterations(published, self.setting.num_gpus)

    def checkpoint(self, iteration: int | None = None) -> str:
        """The file of an iteration of the published setting, or of the end."""
        file = CHECKPOINT
        if iteration is not None:
            file = f"model_{self.iteration(iteration) - 1:07d}.pth"
        return os.path.join(self.setting.folder(self.name), file)


def train(
    setting: Setting,
    name: str,
    config: tuple[str, str],
    seed: int,
    seconds: float,
    opts: Sequence[object] = (),
    processes: int = 1,
) -> Training:
    """A training of a config, with a seed.

    Args:
        config: the folder and the name of the file.
        seconds: on small data; trainings on COCO are not estimated.
        processes: on small data; on COCO the setting says it.
    """
    name = f"train/{name}-seed{seed}"
    file = setting.config(*config)
    texts = tuple(str(o) for o in opts)
    processes = setting.pick(processes, setting.num_gpus)
    if setting.data == "coco":
        texts = (*texts, *scaled(file, texts, setting.num_gpus))
    elif 0 < torch.cuda.device_count() < processes:
        texts = (*texts, "MODEL.DEVICE", "cpu")  # there are GPUs, but not one for each
    own = ("SEED", str(seed), "OUTPUT_DIR", setting.folder(name))
    command = (
        *setting.tool("train"), "--config-file", file, *_num_gpus(processes), *texts,
        *setting.opts, *own,
    )  # fmt: skip
    step = Step(name, command, setting.pick(seconds, 0), processes=processes)
    return Training(step, setting, file, texts)


def _num_gpus(processes: int) -> tuple[str, ...]:
    return ("--num-gpus", str(processes)) if processes > 1 else ()


def evaluate(
    training: Training,
    name: str,
    seconds: float,
    opts: Sequence[object] = (),
    *,
    weights: str | None = None,
) -> Step:
    """An evaluation of a training's checkpoint, by other options: AP in results.json."""
    processes = training.setting.pick(1, training.setting.num_gpus)
    flags = ("--eval-only", *_num_gpus(processes))
    step = _measure(training, "train", name, seconds, flags, opts, weights)
    return step._replace(processes=processes)


def measure(
    training: Training,
    what: str,
    name: str,
    seconds: float,
    images: int,
    opts: Sequence[object] = (),
    *,
    weights: str | None = None,
    needs: Sequence[str] = (),
) -> Step:
    """The "leakage" or the "loss" by batches of so many images: leakage.json or loss.json."""
    flags = ("--images-per-batch", str(images))
    return _measure(training, what, name, seconds, flags, opts, weights, needs)


def _measure(
    training: Training,
    tool: str,
    name: str,
    seconds: float,
    flags: Sequence[str],
    opts: Sequence[object],
    weights: str | None,
    needs: Sequence[str] = (),
) -> Step:
    setting, name = training.setting, f"{training.name}/{name}"
    file = weights or training.checkpoint()
    own = ("MODEL.WEIGHTS", file, "OUTPUT_DIR", setting.folder(name))
    command = (
        *setting.tool(tool), "--config-file", training.config, *flags, *training.opts,
        *map(str, opts), *setting.opts, *own,
    )  # fmt: skip
    return Step(name, command, setting.pick(seconds, 0), (training.name, *needs))


def examine(
    training: Training, name: str, seconds: float, opts: Sequence[object], weights: str
) -> Step:
    """What the doctor says of a checkpoint, and what it expects of its treatment: doctor.json."""
    report = os.path.join(training.setting.folder(f"{training.name}/{name}"), "doctor.json")
    flags = ("--evaluate", "--fail-on", "never", "--format", "json", "--output", report)
    return _measure(training, "doctor", name, seconds, flags, opts, weights)


def recompute(
    training: Training,
    name: str,
    seconds: float,
    flags: Sequence[object] = (),
    opts: Sequence[object] = (),
    *,
    weights: str | None = None,
) -> Step:
    """New population statistics, and AP before and after: precise.pth and precise.json."""
    setting, name = training.setting, f"{training.name}/{name}"
    folder = setting.folder(name)
    command = (
        *setting.tool("recompute"), "--config-file", training.config,
        "--weights", weights or training.checkpoint(),
        "--output", os.path.join(folder, "precise.pth"), "--evaluate", *map(str, flags),
        *training.opts, *map(str, opts), *setting.opts, "OUTPUT_DIR", folder,
    )  # fmt: skip
    return Step(name, command, setting.pick(seconds, 0), (training.name,))


def precise(setting: Setting, step: Step) -> str:
    """The checkpoint that a step of :func:`recompute` writes."""
    return os.path.join(setting.folder(step.name), "precise.pth")


def shown(command: Sequence[str]) -> str:
    """A command as a user types it."""
    is_ours = tuple(command[:2]) == _BN_DET
    return shlex.join(["bn-det", *command[2:]] if is_ours else ["python", *command])
