"""Measure how much a RoI head reads from the other RoIs of its batch.

RoIs of the test set's images are sampled as in training and classified with population and with
batch statistics; see bn_det/measure/leakage.py. The results go to the terminal and to OUTPUT_DIR.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..commands.cli import measure_command
from ..measure.leakage import leakage_table, save_leakage


def main(prog: str, arguments: Sequence[str]) -> None:
    measure_command(
        prog,
        arguments,
        "leakage",
        leakage_table,
        save_leakage,
        description=__doc__,
        epilog="Example: bn-det leakage --config-file configs/leakage/shapes/head_BN.yaml "
        "MODEL.WEIGHTS output/leakage/shapes/head_BN/model_final.pth",
        images="images whose RoIs make a batch: as many as a process had in training",
    )
