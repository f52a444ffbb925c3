#!/usr/bin/env python
"""What bn_det.training.Monitor takes of a training step, at its default period.

Steps that a look is at, and steps in which the monitor does nothing, alternate; the look itself is
timed alone. On a CPU it is the time of the process that counts, as others may use the cores.

    share = (WINDOW * (step in a window - other step) + look) / (PERIOD * other step)
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from typing import Any

import torch
from train_step import CONFIGS, Host, Steps

from bn_det.commands.cli import import_host, run
from bn_det.errors import InputError
from bn_det.training.monitor import PERIOD, WINDOW, Monitor
from bn_det.training.spikes import LossSpikes
from timing import seconds

_WARM_UP = 2


def timed(step: Any) -> float:
    if torch.cuda.is_available():
        return seconds(step)
    start = time.process_time()
    step()
    return time.process_time() - start


def monitor_of(steps: Steps) -> Monitor:
    return next(hook for hook in steps.trainer._hooks if isinstance(hook, Monitor))


def look(steps: Steps) -> float:
    """Seconds of the end of a period, beside its last step."""
    monitor, trainer = monitor_of(steps), steps.trainer
    for trainer.iter in range(PERIOD - WINDOW, PERIOD - 1):
        steps()
        trainer.iter -= 1  # which Steps has moved
    trainer.iter = PERIOD - 1
    monitor.before_step()
    storage = getattr(trainer, "storage", None)
    if storage is None:
        return timed(monitor.after_step)
    with storage:
        return timed(monitor.after_step)


def measure(config: str, host_name: str, rounds: int, opts: list[str]) -> dict[str, Any]:
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        host = Host(import_host(host_name, "train"), opts, PERIOD, folder)
        steps = host.way(config, 4)
        # To it, iterations that are not in order are no training.
        hooks = steps.trainer._hooks
        hooks[:] = [hook for hook in hooks if not isinstance(hook, LossSpikes)]
        looks = [look(steps) for _ in range(3)]
        times: dict[int, list[float]] = {0: [], PERIOD - WINDOW: []}
        for _ in range(_WARM_UP + rounds):
            for iteration, of in times.items():
                steps.trainer.iter = iteration
                of.append(timed(steps))
        off, on = (times[k][_WARM_UP:] for k in times)
    plain = statistics.median(off)
    more = [b - a for a, b in zip(off, on, strict=True)]
    error = 1.25 * statistics.stdev(more) / len(more) ** 0.5  # of a median
    share = (WINDOW * statistics.median(more) + statistics.median(looks)) / (PERIOD * plain)
    return {
        "host": host.name,
        "step_ms": 1e3 * plain,
        "more_in_window_ms": 1e3 * statistics.median(more),
        "look_ms": 1e3 * statistics.median(looks),
        "share": share,
        "standard_error": WINDOW * error / (PERIOD * plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--host", choices=["auto", "detectron2", "torchvision"], default="auto")
    parser.add_argument("--config-file", default=str(CONFIGS / "quick_start.yaml"), metavar="FILE")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of steps, 2 or more")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE")
    args = parser.parse_args()
    if args.rounds < 2:
        raise InputError(f"--rounds: {args.rounds} is not accepted; use 2 or more")
    logging.basicConfig(level=logging.WARNING)
    result = measure(args.config_file, args.host, args.rounds, args.opts)
    if args.json:
        print(json.dumps(result))
        return
    print(
        "{host}: a step takes {step_ms:.1f} ms, {more_in_window_ms:.2f} more in a window, a look "
        "{look_ms:.1f} ms: {share:.2%} of the training, ± {standard_error:.2%}".format(**result)
    )


if __name__ == "__main__":
    run(main)
