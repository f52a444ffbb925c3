"""Measure a RetinaNet's or FCOS's loss with population statistics, and with those of each batch.

On the test set's images, as they are for testing, with a checkpoint's weights; for the loss on the
training set name it in DATASETS.TEST. See bn_det/measure/loss.py. The results go to the terminal
and to OUTPUT_DIR. A loss is for each positive anchor (on torchvision, for each image).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..commands.cli import measure_command
from ..measure.loss import loss_table, save_loss


def main(prog: str, arguments: Sequence[str]) -> None:
    measure_command(
        prog,
        arguments,
        "loss",
        loss_table,
        save_loss,
        description=__doc__,
        epilog="Example: bn-det loss --config-file configs/quick_start.yaml "
        "--images-per-batch 8 MODEL.WEIGHTS output/quick_start/model_final.pth",
        images="images whose statistics are those of a batch: as many as were normalized together "
        "in training",
    )
