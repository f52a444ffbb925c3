#!/usr/bin/env python
"""Train and evaluate a detector from a config file.

The flags are those of Detectron2's tools/train_net.py, and --host.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from bn_det.errors import InputError, one_line
from bn_det.launch import RankError


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's flags, which are known without it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: train_net.py --config-file configs/quick_start.yaml SOLVER.BASE_LR 0.01",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to a config file")
    parser.add_argument(
        "--host",
        choices=["auto", "detectron2", "torchvision"],
        default="auto",
        help="whose detectors and trainer to use; auto takes Detectron2 where it is installed",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="number of processes per machine: GPUs where there are some, else CPU processes",
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="number of machines"
    )
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="K", help="rank of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet: tcp://ADDRESS:PORT of machine 0; auto for one machine",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config options that replace the file's, at the end of the command",
    )
    return parser


def choose_host(requested: str) -> str:
    """The host to use; says in one line which, and why."""
    installed = importlib.util.find_spec("detectron2") is not None
    if requested == "detectron2" and not installed:
        raise InputError(
            "--host: 'detectron2' is not installed; use 'torchvision', or see the README"
        )
    host = requested if requested != "auto" else "detectron2" if installed else "torchvision"
    reason = f"--host {requested}"
    if requested == "auto":
        reason += f", and Detectron2 is {'' if installed else 'not '}installed"
    print(f"Host: {host} ({reason})", flush=True)
    return host


def main() -> None:
    args = argument_parser().parse_args()
    try:
        package = {"detectron2": "d2", "torchvision": "tv"}[choose_host(args.host)]
        importlib.import_module(f"bn_det.{package}.train").main(args)
    except InputError as e:
        sys.exit(f"error: {one_line(e)}")
    except RankError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
