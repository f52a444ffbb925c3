#!/usr/bin/env python
"""Measure how much a RoI head reads from the other RoIs of its batch.

RoIs of the test set's images are sampled as in training and classified with population and with
batch statistics; see bn_det/leakage.py. The results go to the terminal and to OUTPUT_DIR.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from bn_det.command import add_config_arguments, import_host, run
from bn_det.errors import InputError
from bn_det.leakage import leakage_table, save_leakage


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: measure_leakage.py --config-file configs/leakage/shapes/head_BN.yaml "
        "MODEL.WEIGHTS output/leakage/shapes/head_BN/model_final.pth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images-per-batch",
        type=int,
        default=1,
        metavar="N",
        help="images whose RoIs make a batch: as many as a process had in training",
    )
    add_config_arguments(parser)
    # What the set-up that evaluation shares asks for.
    parser.set_defaults(eval_only=True, resume=False, num_gpus=1, num_machines=1)
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    if args.images_per_batch < 1:
        raise InputError(
            f"--images-per-batch: {args.images_per_batch} is not accepted; use 1 or more"
        )
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s %(name)s]: %(message)s", datefmt="%m/%d %H:%M:%S"
    )
    torch.manual_seed(0)  # the sampling of RoIs
    cfg, results = import_host(args.host, "leakage").measure(args)
    print(leakage_table(results))
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_leakage(results, output_dir / "leakage.json")
    print(f"Saved to {output_dir / 'leakage.json'}")


if __name__ == "__main__":
    run(main)
