#!/usr/bin/env python
"""How far the trainings of the experiments on shapes are from a loss spike.

The trainings of the experiments that are named are run on each host, with each seed and number of
threads (rounding decides where it is close; a training in several processes is left out where
each cannot have as many), without evaluation. The table has the largest loss over its running
median of each (``bn_det.training.LossSpikes``; inf where it was not finite at last, nan where there
were too few iterations for a median). With ``--rates`` it is done at several learning rates: the
largest without a spike over that of the config is how far away the edge is. What has been run is
not run again.

--opts are for every training: for the first 400 iterations, at a constant
rate after the warm-up, SOLVER.MAX_ITER 400 SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR
SOLVER.STEPS "()".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from bn_det.commands.cli import choose_host, run
from bn_det.errors import InputError, check_positive
from bn_det.files import finite
from bn_det.reproduce.main import alone, plan, run_to_end
from bn_det.reproduce.registry import EXPERIMENTS
from bn_det.reproduce.runner import Runner
from bn_det.reproduce.steps import Setting
from bn_det.training.spikes import FACTOR, read_spikes

OPTS = (
    *("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0", "TEST.PRECISE_BN.ENABLED", "False"),
    *("SOLVER.CHECKPOINT_PERIOD", "1000000"),
)
"""Losses alone."""


class Ratios(NamedTuple):
    """Of trainings that differ by the seed alone.

    Attributes:
        rate: None for that of the config.
        by_seed: the largest loss over its running median.
    """

    host: str
    training: str
    threads: int
    rate: float | None
    by_seed: dict[int, float]


def measure(args: argparse.Namespace) -> Iterator[Ratios]:
    """Of all trainings; each group of them is run when it is asked for."""
    for number in args.threads:
        check_positive("--threads", number)
    for host in args.hosts:
        choose_host(host)  # whether it is there
        for threads in args.threads:
            for rate in args.rates or [None]:
                yield from measure_group(args, host, threads, rate)


def measure_group(
    args: argparse.Namespace, host: str, threads: int, rate: float | None
) -> list[Ratios]:
    """Of the trainings of one host, number of threads and rate."""
    folder = Path(args.runs) / host / f"threads_{threads}-rate_{'config' if rate is None else rate}"
    own = () if rate is None else ("SOLVER.BASE_LR", str(rate))
    setting = Setting("shapes", host, folder, opts=(*args.opts, *own, *OPTS))
    cores = len(os.sched_getaffinity(0))
    trainings = {
        (step.name.removesuffix(f"-seed{seed}"), seed): step
        for seed in args.seeds
        for step in plan(args.experiments, setting, [seed])
        if step.is_training
    }
    # Processes share the cores out as threads, so that some of a training would have fewer.
    steps = {
        of: step
        for of, step in trainings.items()
        if threads == 1 or step.processes * threads <= cores
    }
    if left := sorted({name for name, _ in trainings.keys() - steps.keys()}):
        print(f"left out, as {threads} threads for each process are too many: {left}", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    jobs = max(1, cores // threads)
    with alone(folder):
        runner = Runner(list(steps.values()), folder, jobs)
        for failure in run_to_end(runner):
            raise InputError(f"{folder / failure.step.name} has failed: {failure.reason}")
    found: dict[str, dict[int, float]] = {}
    for (name, seed), step in steps.items():
        (folder / step.name / "model_final.pth").unlink(missing_ok=True)
        diverged = runner.outcomes[step.name].diverged_at is not None
        largest = read_spikes(folder / step.name)["largest"]
        ratio = largest["ratio"] if largest else math.nan
        found.setdefault(name, {})[seed] = math.inf if diverged else ratio
    return [Ratios(host, name, threads, rate, of_seeds) for name, of_seeds in found.items()]


def table(found: list[Ratios]) -> str:
    rows = [
        [
            *(of.host, of.training.removeprefix("train/"), of.threads),
            "config" if of.rate is None else of.rate,
            ", ".join(f"{ratio:.2f}" for ratio in of.by_seed.values()),
            sum(ratio >= FACTOR for ratio in of.by_seed.values()),
        ]
        for of in found
    ]
    headers = ["host", "training", "threads", "rate", "largest loss / median, by seed", "spikes"]
    return tabulate(rows, headers, tablefmt="pipe")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT")
    parser.add_argument(
        "--hosts", nargs="+", choices=["detectron2", "torchvision"], default=["torchvision"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="SEED")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--rates", type=float, nargs="+", metavar="LR", help="SOLVER.BASE_LR")
    parser.add_argument("--runs", default="output/loss_spikes", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="for every training"
    )
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    with redirect_stdout(sys.stderr):
        found = list(measure(args))
    print(json.dumps([finite(of._asdict()) for of in found]) if args.json else table(found))


if __name__ == "__main__":
    run(main)
