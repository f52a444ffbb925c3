"""The cases of benchmarks/doctor.py, and how each is examined."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from doctor_faults import FAULTS, DoesNotApplyError, Plant, planted
from doctor_models import Healthy
from torch import nn

import bn_det.doctor
from bn_det import examine
from bn_det.doctor import Report, examine_file
from bn_det.errors import InputError, one_line

HEALTHY = "healthy"
DRAWS = 20
"""Examinations of each healthy model: of all eight without alarm, 1 in 50 is the bound of 95 %."""

NUM_ITERS = 32
COSTS = 1.0
"""AP from which on a fault has to be found."""


class Case(NamedTuple):
    """Attributes:
    model, fault: by name; the fault may be HEALTHY.
    strength: of the fault, from 0 to 2; of a healthy model the number of the draw.
    """

    model: str
    fault: str
    strength: int

    @property
    def name(self) -> str:
        return "/".join(map(str, self))

    @property
    def hash(self) -> int:
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:12], 16)

    @property
    def is_held(self) -> bool:
        """Whether it is one of the third that is kept apart."""
        return self.hash % 3 == 0

    @property
    def seed(self) -> int:
        """Of its images, and of what the fault draws."""
        return self.hash % 2**31


class Examined(NamedTuple):
    """Attributes:
    case: what was examined.
    applies: whether the model could have the fault.
    before, planted, after: AP without the fault, with it, and treated, if it was.
    alarms, notes: rules.
    error: why there is no report of the model.
    """

    case: Case
    applies: bool
    before: float = 0.0
    planted: float = 0.0
    after: float | None = None
    alarms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""

    @property
    def lost(self) -> float:
        return self.before - self.planted

    @property
    def costs(self) -> bool:
        return self.lost >= COSTS

    @property
    def is_found(self) -> bool:
        return not set(FAULTS[self.case.fault].rules).isdisjoint(self.alarms)

    @property
    def is_noted(self) -> bool:
        """Whether the right rule is there as a note alone."""
        return not self.is_found and not set(FAULTS[self.case.fault].rules).isdisjoint(self.notes)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Alarms that are not about the fault, nor about what follows from it."""
        if self.case.fault == HEALTHY:
            return self.alarms
        fault = FAULTS[self.case.fault]
        return tuple(of for of in self.alarms if of not in (*fault.rules, *fault.also))

    @classmethod
    def read(cls, line: str) -> Examined:
        content = json.loads(line)
        of = cls(**content)
        return of._replace(case=Case(*of.case), alarms=tuple(of.alarms), notes=tuple(of.notes))


def scored(subject: Healthy, model: nn.Module) -> float:
    """Of a model in evaluation mode, which is then in training mode, but for layers that stay."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return subject.score(model)
    finally:
        for module, mode in modes:
            module.training = mode


def score_of_healthy(subject: Healthy) -> float:
    model = subject.make()
    model.load_state_dict(subject.state)
    return subject.score(model.eval())


def report_of_file(plant: Plant) -> Report:
    """What the doctor says of the checkpoint alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broken.pth"
        torch.save({"model": plant.state}, path)
        report = examine_file(path)
        return report._replace(verdict=report.verdict.replace(str(path), path.name))


def loaded(subject: Healthy, plant: Plant) -> nn.Module:
    """A model with the fault, in training mode."""
    model = subject.make()
    model.load_state_dict(plant.state, strict=False)
    model.train()
    for change in plant.after:
        change(model)
    return model


def examined(case: Case, subject: Healthy, before: float) -> Examined:
    """What is found in a case.

    Args:
        before: the AP of the healthy model.
    """
    is_healthy = case.fault == HEALTHY
    try:
        plant = (
            Plant(subject, case.seed)
            if is_healthy
            else planted(case.fault, case.strength, subject, case.seed)
        )
    except DoesNotApplyError:
        return Examined(case, False)
    findings = list(report_of_file(plant).findings)
    model = loaded(subject, plant)
    now = before if is_healthy else scored(subject, model)
    treat = not is_healthy and FAULTS[case.fault].of_statistics and before - now >= COSTS
    error = ""
    try:
        findings += examine(
            model, subject.kind.batches(case.seed), NUM_ITERS, call=subject.kind.call, treat=treat,
            # Whether other rules alarm of a healthy model is wanted, too.
            evaluate=is_healthy, score=first_known(now, subject.score) if treat else None,
        ).findings  # fmt: skip
    except InputError as e:
        error = one_line(e)
    after = scored(subject, model) if treat else None
    alarms = {of.rule for of in findings if of.severity != "note"}
    notes = {of.rule for of in findings} - alarms
    rules = tuple(sorted(alarms)), tuple(sorted(notes))
    return Examined(case, True, before, now, after, *rules, error)


def first_known(value: float, score: Callable[[nn.Module], float]) -> Callable[[Any], float]:
    """A score whose first call, of the model as it is, is known."""
    known = [value]
    return lambda model: known.pop() if known else score(model)


def fingerprint() -> str:
    """Of the sources of the doctor and of what is planted: with others, results may be others."""
    folder = Path(bn_det.doctor.__file__).parent
    files = [*folder.glob("*.py"), *Path(__file__).parent.glob("doctor_*.py")]
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()[:12]
