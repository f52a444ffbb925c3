#!/usr/bin/env python
"""Run the experiments of Wu & Johnson, Rethinking "Batch" in BatchNorm, and report them.

On COCO as published (8 GPUs), or on the shapes data, which is generated, on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bn_det.command import run
from bn_det.reproduce.main import reproduce
from bn_det.reproduce.registry import EXPERIMENTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT")
    parser.add_argument("--data", choices=["coco", "shapes"], default="shapes")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--num-gpus", type=int, metavar="N")
    parser.add_argument("--host", choices=["auto", "detectron2", "torchvision"], default="auto")
    parser.add_argument("--output", metavar="DIR")
    parser.add_argument("--runs", metavar="DIR")
    parser.add_argument("--jobs", type=int, metavar="N")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--yes", action="store_true")
    parser.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    reproduce(parser.parse_intermixed_args(), Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    run(main)
