#!/usr/bin/env python
"""Train and evaluate a detector from a config file.

The flags are those of Detectron2's tools/train_net.py, and --host.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

from bn_det.errors import InputError, one_line


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
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine")
    parser.add_argument(
        "--dist-url",
        # The same for all runs of a user: a run that is left over is noticed by its port.
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + os.getuid() % 2**14}",
        help="where processes meet, see torch.distributed",
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


if __name__ == "__main__":
    main()
