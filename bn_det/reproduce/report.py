"""What a report of experiments is, and of which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import read_json
from .claims import Claim, claims_of
from .ledger_picture import ledger_picture
from .looks import Looks
from .registry import experiments_on
from .results import Picture, Results, Table
from .runner import Failure
from .steps import Setting, Step
from .verdicts import Verdict, judge

RESULTS = "results.json"


class Report(NamedTuple):
    """What is shown of some experiments.

    Attributes:
        title: what the user asked for.
        shows: tables and pictures by experiment.
        ledger: the claims that were tested, with their verdicts.
        picture: of the ledger; None where nothing is known.
        steps: all of them, in their order.
        failures: what went wrong.
        looks: when claims are looked at, this time among others.
        spikes: what is noted of the losses of each training, by its name.
        diverged: the iterations at which trainings had a loss that was not finite, by their names.
    """

    title: str
    results: Results
    shows: dict[str, list[Table | Picture]]
    ledger: list[tuple[Claim, Verdict]]
    picture: Picture | None
    steps: Sequence[Step]
    failures: Sequence[Failure]
    looks: Looks
    spikes: dict[str, dict[str, Any]]
    diverged: dict[str, int]


def make_report(
    title: str,
    names: Sequence[str],
    results: Results,
    steps: Sequence[Step],
    failures: Sequence[Failure],
    looks: Looks | None = None,
    decided: Mapping[str, Verdict] = MappingProxyType({}),
    numbers: Mapping[str, int] = MappingProxyType({}),
) -> Report:
    """Of the experiments that are named, as far as their steps have been done.

    Args:
        looks: one at the seeds of the results, by default.
        decided: verdicts of earlier looks, by claim, which stand.
        numbers: of seeds that experiments have had, by name; all, where it says nothing.
    """
    looks = looks or Looks((len(results.seeds),), 0.95)
    experiments = experiments_on(results.setting.data)
    every = len(results.seeds)
    shows = {
        name: experiments[name].show(results.of_seeds(numbers.get(name, every))) for name in names
    }
    ledger = [
        (claim, decided.get(claim.name) or verdict_of(claim, results, looks.confidence))
        for claim in claims_of(names, results.setting.data)
    ]
    spikes = {s.name: results.spikes(s.name) for s in steps if s.is_training}
    known = {name: noted for name, noted in spikes.items() if noted["largest"]}  # as any spike is
    ended = {
        s.name: results.outcomes[s.name].diverged_at for s in steps if s.name in results.outcomes
    }
    diverged = {name: at for name, at in ended.items() if at is not None}
    picture = ledger_picture(ledger, looks.confidence)
    return Report(title, results, shows, ledger, picture, steps, failures, looks, known, diverged)


def verdict_of(claim: Claim, results: Results, confidence: float = 0.95) -> Verdict:
    """By the seeds that count: those in which no training that the effect is of has leapt.

    Unless the claim is about how much a training bears.
    """
    effect = experiments_on(results.setting.data)[claim.experiment].EFFECTS[claim.name]
    effects: dict[int, float] = {}
    left_out, unknown = [], []
    for seed in results.seeds:
        value, trainings = results.with_trainings(effect, seed)
        if not claim.with_spikes and any(map(results.leapt, trainings)):
            left_out.append(seed)
        elif value is None:
            unknown.append(seed)
        else:
            effects[seed] = value
    verdict = judge(claim, list(effects.values()), confidence)
    return verdict._replace(seeds=tuple(effects), left_out=tuple(left_out), unknown=tuple(unknown))


def identity(title: str, setting: Setting, looks: Looks) -> dict[str, Any]:
    """What must be the same for a report to be written over another."""
    return {
        "experiment": title,
        "data": setting.data,
        "host": setting.host,
        "num_gpus": setting.num_gpus,
        "opts": list(setting.opts),
        "looks": list(looks.seeds) if looks.are_several else None,
    }


def known_identity(folder: Path) -> Mapping[str, Any] | None:
    """That of the report in a folder, and its seeds; None where there is none.

    Raises:
        InputError: there is a file of that name which is none of a report.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (OSError, RecursionError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("seeds"), list):
        raise InputError(f"--output: {path} is not of a report; use another folder")
    return found
