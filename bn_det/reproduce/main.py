"""What bn-det reproduce does."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from tabulate import tabulate

from ..commands.cli import choose_host
from ..errors import InputError
from ..files import check_writable
from .checks import check_arguments, check_data, check_folder, check_host, check_options
from .claims import claims_of
from .looks import DECIDED, DEFAULT_SEEDS, Looks, looks_of, undecided
from .published import NUM_GPUS
from .registry import EXPERIMENTS, experiments_on
from .report import Report, known_identity, make_report
from .results import Results, Table
from .runner import Failure, Runner
from .save import write_report
from .steps import Setting, Step, estimate, shown
from .verdicts import Verdict
from .words import ledger_markdown, spikes_text, table_text, warnings_of

_TIMED_ON = "detectron2"
"""The host whose times the steps' estimates are."""


def reproduce(args: argparse.Namespace) -> None:
    """Run experiments and report them.

    Args:
        args: of the command.

    Raises:
        InputError: something is not accepted, or is missing.
    """
    check_data(args.experiment, args.data)
    names = _names(args)
    check_arguments(args, names)
    looks = looks_of(args)
    setting = _setting(args)
    check_host(setting)
    if setting.opts:
        check_options(plan(names, setting, [1]), setting)
    of = f"{args.experiment}-{args.data}-{setting.host}"
    folder = Path(args.output or f"output/reproduce/{of}")
    check_folder(folder, args.experiment, setting, looks)
    if not args.dry_run:
        check_writable("--output", folder)
    with nullcontext() if args.dry_run else alone(setting.runs):
        _write_all(_reports(args, names, setting, looks), folder)


def _write_all(reports: Iterable[Report], folder: Path) -> None:
    """Each in place of the one before; one of more seeds stays until the last is there.

    And one of as many seeds, in which no step has failed, stays where some have.
    """
    known = known_identity(folder) or {"seeds": ()}
    before = len(known["seeds"])
    held = None
    for report in reports:
        print(_summary(report))
        number = len(report.results.seeds)
        held = report if number < before else None
        if number == before and report.failures and not known.get("failed"):
            print(f"Not saved: {folder} has a report without failures, which stays")
        elif held is None:
            _save(report, folder)
        _exit_with_failures(report)
    if held is not None:
        _save(held, folder)


def _save(report: Report, folder: Path) -> None:
    write_report(report, folder)
    print(f"Saved to {folder / 'report.html'}", flush=True)


def _reports(
    args: argparse.Namespace, names: Sequence[str], setting: Setting, looks: Looks
) -> Iterator[Report]:
    """What has come out at each look; the last is the first at which all claims are decided."""
    claims = claims_of(names, setting.data)
    decided: dict[str, Verdict] = {}
    steps: dict[str, Step] = {}
    numbers: dict[str, int] = {}
    for number in looks.seeds:
        left = undecided(names, claims, decided)
        if not left:
            return
        seeds = range(1, number + 1)
        steps |= {step.name: step for step in plan(left, setting, seeds)}
        numbers |= dict.fromkeys(left, number)
        runner = Runner(list(steps.values()), setting.runs, args.jobs or default_jobs(setting))
        if args.dry_run:  # the summary last, where one looks
            print("\n".join(shown(step.command) for step in runner.pending()), end="\n\n")
        print(_overview(left, setting, seeds, runner, looks), flush=True)
        if args.dry_run:
            return
        results = Results(setting, runner.outcomes, seeds)
        for step in runner.steps:  # before anything is run for a report that cannot be made
            if step.is_training:
                results.spikes(step.name)
        failures = run_to_end(runner)
        done = runner.steps, failures, looks, decided, numbers
        report = make_report(args.experiment, names, results, *done)
        decided |= {claim.name: of for claim, of in report.ledger if of.word in DECIDED}
        yield report


def run_to_end(runner: Runner) -> list[Failure]:
    """The steps that have failed; none is left running where the command is ended before."""
    try:
        with _terminated_as_interrupted():
            return runner.run()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where this one was")


def _exit_with_failures(report: Report) -> None:
    """End the command where steps have failed."""
    if failures := report.failures:
        runs = report.results.setting.runs
        logs = "\n".join(f"  {runs / f.step.name}: {f.reason}" for f in failures)
        sys.exit(f"error: {len(failures)} steps have failed; the same command tries again:\n{logs}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems send, does what Ctrl-C does, so that no step is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def plan(names: Sequence[str], setting: Setting, seeds: Iterable[int]) -> list[Step]:
    """The steps of experiments, each once, and after those that it needs."""
    found: dict[str, Step] = {}
    for seed in seeds:
        for name in names:
            for step in experiments_on(setting.data)[name].plan(setting, seed):
                found.setdefault(step.name, step)
    return list(found.values())


def times() -> str:
    """For the command's help: about how long each experiment takes on small data."""
    named = {**{name: [name] for name in EXPERIMENTS}, "all": list(EXPERIMENTS)}
    columns = [(data, seeds) for data in ("shapes", "cells") for seeds in (DEFAULT_SEEDS, 1)]
    rows = [[name, *(_time(names, *of) for of in columns)] for name, names in named.items()]
    headers = ["", *(f"{data}, {_seeds(seeds)}" for data, seeds in columns)]
    return (
        "About how long it takes on two CPU cores and Detectron2 (all of them less than together,\n"
        f"as they share trainings):\n\n{tabulate(rows, headers, tablefmt='plain')}"
    )


def _time(names: Sequence[str], data: str, seeds: int) -> timedelta | str:
    """Of experiments, as far as there are some on the data."""
    there = [name for name in names if name in experiments_on(data)]
    setting = Setting(data, _TIMED_ON, Path("runs"))
    return estimate(plan(there, setting, range(1, seeds + 1)), 2) if there else "-"


def _seeds(number: int) -> str:
    return f"--seeds {number}" + " (default)" * (number == DEFAULT_SEEDS)


def default_jobs(setting: Setting) -> int:
    """Two on CPU cores, which that keeps busier than one; one where GPUs are there or needed."""
    has_gpus = torch.cuda.is_available() or not setting.is_small
    return 1 if has_gpus else min(2, len(os.sched_getaffinity(0)))


def _names(args: argparse.Namespace) -> list[str]:
    if args.experiment != "all":
        return [args.experiment]
    return list(experiments_on(args.data))


def _setting(args: argparse.Namespace) -> Setting:
    host = choose_host(args.host)
    runs = Path(args.runs or f"output/reproduce/runs-{args.data}-{host}")
    return Setting(args.data, host, runs, args.num_gpus or NUM_GPUS, tuple(args.opts))


@contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Keep other commands out of a folder of runs."""
    check_writable("--runs", runs)
    with open(runs / ".lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"--runs: another command is at work in {runs}") from e
        yield


def _overview(
    names: Sequence[str], setting: Setting, seeds: range, runner: Runner, looks: Looks
) -> str:
    """What will be run, and about how long it takes."""
    pending = {step.name for step in runner.pending()}
    rows = []
    for name in names:
        steps = plan([name], setting, seeds)
        left = [step for step in steps if step.name in pending]
        time = estimate(left, runner.jobs) if setting.is_small else "not known"
        trainings = sum(step.is_training for step in steps)
        rows.append([name, trainings, len(steps) - trainings, len(steps) - len(left), time])
        pending -= {step.name for step in left}  # what experiments share is counted once
    headers = ["experiment", "trainings", "measurements", "done or shared", "about"]
    table = tabulate(rows, headers=headers, tablefmt="pipe")
    left = runner.pending()
    time = f", about {estimate(left, runner.jobs)} on as many CPU cores as run at a time"
    time += ", as measured on Detectron2" if setting.host != _TIMED_ON else ""
    time += ", by the settings' own options" if setting.opts else ""
    tested = ", ".join(f"'{claim.name}'" for claim in claims_of(names, setting.data))
    of_looks = _of_looks(names, setting, seeds, runner, looks)
    return (
        f"{table}\n{of_looks}{len(left)} of {len(runner.steps)} steps are to be run"
        f"{time if setting.is_small else ''}, {runner.jobs} at a time\n"
        f"Claims that are tested (docs/claims.md has their thresholds): {tested}"
    )


def _of_looks(
    names: Sequence[str], setting: Setting, seeds: range, runner: Runner, looks: Looks
) -> str:
    """Which look it is, and what all of them may cost; "" where there is one."""
    if not looks.are_several:
        return ""
    every = plan(names, setting, range(1, looks.seeds[-1] + 1))
    left = Runner(every, setting.runs, runner.jobs).pending()
    time = f", {estimate(left, runner.jobs)}" if setting.is_small else ""
    seen = ", ".join(map(str, looks.seeds))
    return (
        f"{len(seeds)} seeds; looked at with {seen}, until all claims are decided; at most "
        f"{len(left)} steps{time}\n"
    )


def _summary(report: Report) -> str:
    texts = [
        table_text(item)
        for show in report.shows.values()
        for item in show
        if isinstance(item, Table)
    ]
    spikes = "\n".join(spikes_text(report))
    return "\n\n".join([*texts, ledger_markdown(report), spikes, *warnings_of(report)])
