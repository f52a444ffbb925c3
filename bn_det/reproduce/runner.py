"""Runs steps, several at a time, and continues where it was interrupted."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, reason_of
from ..files import read_json, write_json
from ..training.spikes import read_spikes, spike_text
from .data_used import data_used
from .published import file_values
from .steps import Step, estimate, shown

LOG = "reproduce.log"
BEGUN = "command.json"
DONE = "done.json"

_DIVERGED = re.compile(r"(?:loss not finite at |Loss became infinite or NaN at )iteration[= ](\d+)")
"""What either host says of a loss that is not finite, and when."""


Values = Callable[[str], Mapping[str, Any]]
"""From a config file to its values by key, as :func:`.published.file_values`."""


class Outcome(NamedTuple):
    """How a step ended.

    Attributes:
        seconds: that it took, alone or beside others; of a training that was resumed, the last
            part.
        diverged_at: the iteration at which a training's loss was not finite; None if it was.
        versions: of the packages that it ran with; None where that was not noted.
        threads: OMP_NUM_THREADS; rounding depends on it.
        resumed: whether it was interrupted, and went on.

    Versions and threads are several, with commas, of a training that was resumed with others.
    """

    seconds: float
    diverged_at: int | None
    versions: Mapping[str, str] | None = None
    threads: str | None = None
    resumed: bool = False


class Failure(NamedTuple):
    step: Step
    reason: str


def outcome_of(step: Step, runs: Path, values: Values = file_values) -> Outcome | None:
    """What is noted of a step that has been done; None if it has not.

    Args:
        values: of a config file.

    Raises:
        InputError: another command, or one with another config, has been done in its folder.
    """
    path = runs / step.name / DONE
    if not path.is_file():
        return None
    noted = _noted(path)
    _check_same(step, noted, path.parent, values)
    return _outcome(noted)


def _noted(path: Path) -> dict[str, Any]:
    """What is noted of a step."""
    try:
        noted = read_json(path)
        if not isinstance(noted.get("command"), list):
            raise ValueError("it has no command")
        if not isinstance(noted.get("data", {}), dict):
            raise TypeError("its data are no names with digests")
        if path.name == DONE:
            if not {"seconds", "diverged_at"} <= noted.keys():
                raise ValueError("it does not say how the step ended")
            _check_ended(noted)
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as e:
        raise InputError(
            f"--runs: {path} cannot be read ({reason_of(e)}); remove its folder, and the step runs "
            "again"
        ) from e
    return noted


def _check_ended(noted: Mapping[str, Any]) -> None:
    """Raise TypeError where what is noted of how a step ended has values of other kinds."""
    texts, none = (str,), type(None)
    kinds: dict[str, tuple[type, ...]] = {
        "seconds": (int, float),
        "diverged_at": (int, none),
        "versions": (dict, none),
        "threads": (str, none),
        "resumed": (bool, none),
    }
    values = [(key, noted.get(key), kind) for key, kind in kinds.items()]
    values += [
        (f"versions.{name}", of, texts) for name, of in (noted.get("versions") or {}).items()
    ]
    for key, value, kind in values:
        if not isinstance(value, kind):
            raise TypeError(f"its {key} is a {type(value).__name__}")
    if not math.isfinite(noted["seconds"]):
        raise ValueError(f"its seconds are {noted['seconds']}")


def _outcome(noted: Mapping[str, Any]) -> Outcome:
    return Outcome(
        noted["seconds"],
        noted["diverged_at"],
        noted.get("versions"),
        noted.get("threads"),
        noted.get("resumed", False),
    )


def _also(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Texts by name, to any depth, with those that there were before and are others now."""
    found: dict[str, Any] = {}
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, Mapping):
            found[name] = _also(old or {}, value)
        else:
            found[name] = ", ".join(dict.fromkeys([*(old or value).split(", "), value]))
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in ("bn_det", "torch", "torchvision", "detectron2", "timm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Runner:
    """Runs steps in the order in which they can be, and notes those that are done.

    Each has a folder for its results, its log and what is noted of it. A training that has been
    interrupted is resumed; any other step is run anew. A step that fails does not end the others,
    but those that need it are left out, as they are after a training that diverged.

    Args:
        steps: each once.
        runs: the folder of all.
        jobs: how many processes run at a time.
    """

    def __init__(self, steps: Sequence[Step], runs: Path, jobs: int) -> None:
        self.steps, self.runs, self.jobs = list(steps), runs, jobs
        once = cache(file_values)  # many steps have the same config
        self.outcomes = {s.name: o for s in steps if (o := outcome_of(s, runs, once)) is not None}
        self.failures: list[Failure] = []
        self.done: list[tuple[Step, float]] = []  # in this call, and the seconds of each

    def pending(self) -> list[Step]:
        """What is to be run still."""
        out = {f.step.name for f in self.failures}
        out |= {name for name, o in self.outcomes.items() if o.diverged_at is not None}
        pending = []
        for step in self.steps:  # a step comes after those that it needs
            if any(name in out for name in step.needs):
                out.add(step.name)
            elif step.name not in self.outcomes and step.name not in out:
                pending.append(step)
        return pending

    def run(self) -> list[Failure]:
        """Run all; the steps that have failed."""
        running: dict[str, tuple[Step, subprocess.Popen, float]] = {}
        last_look = time.monotonic()
        try:
            while (pending := self.pending()) or running:
                for step in pending:
                    if step.name not in running and self._can_start(step, running):
                        running[step.name] = (step, self._start(step), time.monotonic())
                if not running:
                    missing = sorted({name for step in pending for name in step.needs})
                    raise ValueError(f"no step makes what these need: {missing}")
                time.sleep(0.2)
                for name, (step, process, begin) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        self._finish(step, process.returncode, time.monotonic() - begin)
                if time.monotonic() - last_look > 60:
                    last_look = time.monotonic()
                    self._look(list(running))
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
        return self.failures

    def _can_start(self, step: Step, running: dict[str, tuple]) -> bool:
        used = sum(min(s.processes, self.jobs) for s, _, _ in running.values())
        is_ready = all(name in self.outcomes for name in step.needs)
        return is_ready and used + min(step.processes, self.jobs) <= self.jobs

    def _start(self, step: Step) -> subprocess.Popen:
        folder = self.runs / step.name
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / BEGUN
        resume: tuple[str, ...] = ()
        before: Mapping[str, Any] = {}
        if step.is_training and begun.is_file() and (folder / "last_checkpoint").is_file():
            before = _noted(begun)
            _check_same(step, before, folder)
            resume = ("--resume",)
        else:  # lines are appended to it
            (folder / "metrics.json").unlink(missing_ok=True)
        environment = dict(os.environ)
        share = max(1, len(os.sched_getaffinity(0)) // max(1, self.jobs // step.processes))
        threads = environment.setdefault("OMP_NUM_THREADS", str(share))
        how = _also(before, {"versions": _versions(), "threads": threads})
        settings = settings_of(step)
        settings["data"] = {**data_used(settings), **before.get("data", {})}
        write_json(begun, {**settings, **how, "resumed": bool(resume)})
        print(f"{'resumes' if resume else 'starts'} {step.name}", flush=True)
        with open(folder / LOG, "a" if resume else "w") as log:
            return subprocess.Popen(
                [sys.executable, *step.command, *resume],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                # The lock on the folder of runs lasts as long as what runs in it.
                close_fds=False,
            )

    def _finish(self, step: Step, code: int, seconds: float) -> None:
        folder = self.runs / step.name
        diverged = _DIVERGED.search((folder / LOG).read_text(errors="replace")) if code else None
        if code and not (step.is_training and diverged):
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            reason = f"{how}: {_last_line(folder / LOG)}"
            self.failures.append(Failure(step, reason))
            print(f"FAILED {step.name}: {reason}", flush=True)
            return
        ended = {
            "seconds": round(seconds, 1),
            "diverged_at": int(diverged[1]) if diverged else None,
        }
        # As it was when the step began: the file may have changed since. But shapes that were not
        # there have been drawn.
        noted = _noted(folder / BEGUN)
        try:
            _check_same_data(noted, folder)
        except InputError as e:
            self.failures.append(Failure(step, str(e)))
            print(f"FAILED {step.name}: {e}", flush=True)
            return
        done = {**noted, **ended, "data": {**data_used(noted), **noted["data"]}}
        write_json(folder / DONE, done)
        self.outcomes[step.name] = _outcome(done)
        if not noted["resumed"]:  # of which this was a part
            self.done.append((step, seconds))
        how = f"diverged at iteration {diverged[1]}" if diverged else "done"
        for spike in read_spikes(folder)["spikes"]:
            print(f"LOSS SPIKE in {step.name}: {spike_text(spike)}", flush=True)
        took = timedelta(seconds=round(seconds))
        print(
            f"[{len(self.outcomes)}/{len(self.steps)}] {how} {step.name} in {took}; {self._left()}",
            flush=True,
        )

    def _left(self) -> str:
        """By how much longer than estimated the steps of this call have taken."""
        pending = self.pending()
        left = estimate(map(self._as_others_took, pending), self.jobs)
        return f"about {left} left" if left else f"{len(pending)} steps left"

    def _as_others_took(self, step: Step) -> Step:
        """A training by trainings and a measurement by measurements, as far as there are any.

        Options of the user's may take one kind far from its estimate, and not the other.
        """
        alike = [of for of in self.done if of[0].is_training == step.is_training] or self.done
        estimated = sum(of.seconds for of, _ in alike)
        factor = sum(took for _, took in alike) / estimated if estimated else 0.0
        return step._replace(seconds=step.seconds * factor)

    def _look(self, names: Sequence[str]) -> None:
        """Where the steps are that run now, by the times left that their logs tell."""
        for name in names:
            text = (self.runs / name / LOG).read_text(errors="replace")
            lines = [line for line in text.splitlines() if "eta:" in line.lower() or "ETA=" in line]
            if lines:
                print(f"  {name}: {' '.join(lines[-1].split('  ')[0:3])}", flush=True)


def settings_of(step: Step, values: Values = file_values) -> dict[str, Any]:
    """What a step is: its command, and what its config file says with its bases, by key."""
    config: Mapping[str, Any] = {}
    if "--config-file" in step.command:
        config = values(step.config)
    # As it is when it has been noted: JSON has no tuples.
    return {"command": list(step.command), "config": json.loads(json.dumps(config))}


def _check_same(step: Step, found: Any, folder: Path, values: Values = file_values) -> None:
    """Raise InputError unless what is noted in the step's folder is the step as it is now."""
    now = settings_of(step, values)
    if not isinstance(found, Mapping) or not isinstance(found.get("config"), Mapping):
        raise InputError(
            f"--runs: {folder} does not say with which settings it was run, as it was made before "
            "they were noted; use another folder"
        )
    if found["command"] != now["command"]:
        raise InputError(
            f"--runs: {folder} has another command: {shown(found['command'])}, and not "
            f"{shown(step.command)}; use another folder (or, if only paths differ, the same "
            "working directory)"
        )
    for key in sorted(now["config"].keys() | found["config"].keys()):
        before, after = (of["config"].get(key, "not there") for of in (found, now))
        if before != after:
            raise InputError(
                f"--runs: {folder} was run with other settings: {key} was {before!r} in its "
                f"config, and is {after!r}; use another folder"
            )
    _check_same_data(found, folder)


def _check_same_data(found: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError where a data set that the step was run on is another now."""
    noted = found.get("data", {})  # which runs of before it was noted have not
    settings = {"command": found["command"], "config": found["config"]}
    for name, digest in data_used(settings).items():
        if noted.get(name, digest) != digest:
            raise InputError(
                f"--runs: {folder} was run on other data: the annotations of {name} are not what "
                "they were; use another folder, or the data (DETECTRON2_DATASETS) with which it "
                "was run"
            )


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
