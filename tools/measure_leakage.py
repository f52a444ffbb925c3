#!/usr/bin/env python
"""Measure how much a RoI head reads from the other RoIs of its batch.

RoIs of the test set's images are sampled as in training and classified with population and with
batch statistics; see bn_det/measure/leakage.py. The results go to the terminal and to OUTPUT_DIR.
"""

from __future__ import annotations

import ctrl_c  # noqa: F401

from bn_det.commands.cli import measure_command, run
from bn_det.measure.leakage import leakage_table, save_leakage


def main() -> None:
    measure_command(
        "leakage",
        leakage_table,
        save_leakage,
        description=__doc__,
        epilog="Example: measure_leakage.py --config-file configs/leakage/shapes/head_BN.yaml "
        "MODEL.WEIGHTS output/leakage/shapes/head_BN/model_final.pth",
        images="images whose RoIs make a batch: as many as a process had in training",
    )


if __name__ == "__main__":
    run(main)
