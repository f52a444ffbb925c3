"""How much a RoI head with BatchNorm reads from the other RoIs of its batch.

In training, the RoIs that normalize each other come from one or two images and are alike; a head
can learn to take the batch as a hint (Wu & Johnson, Sec. 6). AP with batch statistics does not
show it by itself, because at test time the RoIs of an image are distributed otherwise than those
sampled for training. So here RoIs of held-out images are sampled as in training, and classified
twice: with batch and with population statistics. What the batch gives beyond the population on
new images, it gives as a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from yacs.config import CfgNode

from ..errors import choose
from ..files import finite, write_json
from .bootstrap import Estimate, by_statistics

METRICS = ("foreground accuracy", "accuracy", "loss")
"""Of the classification of RoIs, background a class: percent, percent, mean cross entropy."""


class RoIBatch(NamedTuple):
    """RoIs sampled from the images of one normalization batch.

    Attributes:
        features: what the box head takes, shape (R, C, H, W).
        labels: their classes, shape (R,).
        background: the class that is none.
    """

    features: Tensor
    labels: Tensor
    background: int


def check_architecture(cfg: CfgNode) -> None:
    """Raise InputError unless the config's detector has a box head that RoIs are sampled for."""
    accepted = ["GeneralizedRCNN", "BNGeneralizedRCNN"]
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, accepted)
    choose("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, ["StandardROIHeads"])


def measure_leakage(
    batches: Iterable[RoIBatch],
    num_batches: int,
    head: nn.Module,
    classify: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, Estimate]]:
    """Classify RoIs with the population statistics of a head and with those of each batch.

    Args:
        batches: RoIs of held-out images, sampled as in training.
        num_batches: for the time left.
        head: the module whose normalization is meant, in evaluation mode.
        classify: from RoI features to logits (R, number of classes + 1), through the head.

    Returns:
        ``{"population": {metric: estimate}, "batch": ..., "batch - population": ...}``; only the
        first for a head without batch statistics, which has nothing to leak by. The intervals are
        bootstrapped over batches, and the same resamples serve all: RoIs of a batch are not
        independent, and differences are paired.
    """
    message = "Classified the RoIs of %d/%d batches"
    found = by_statistics(
        batches, num_batches, head, message, lambda b: _count(classify(b.features), b), _metrics
    )
    return {s: dict(zip(METRICS, estimates, strict=True)) for s, estimates in found.items()}


def leakage_table(results: dict[str, dict[str, Estimate]]) -> str:
    """For the terminal."""
    rows = [
        [name, *(e.text(".3f") for e in estimates.values())] for name, estimates in results.items()
    ]
    table = tabulate(rows, ["statistics", *METRICS], tablefmt="pipe", disable_numparse=True)
    if "batch" not in results:
        table += "\nThe head has no batch statistics: nothing can leak by them."
    return table


def save_leakage(results: dict[str, dict[str, Estimate]], path: Path) -> None:
    """As JSON, each estimate with its value, low and high; null for what is not finite."""
    content = {s: {m: e._asdict() for m, e in of_s.items()} for s, of_s in results.items()}
    write_json(path, finite(content))


def _count(logits: Tensor, batch: RoIBatch) -> list[float]:
    """Foreground RoIs, those of them that are right, all RoIs, those right, summed loss."""
    right = logits.argmax(1) == batch.labels
    foreground = batch.labels != batch.background
    loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
    counts: list[Tensor | int]
    counts = [foreground.sum(), (right & foreground).sum(), right.numel(), right.sum(), loss]
    return [float(c) for c in counts]


def _metrics(sums: np.ndarray) -> np.ndarray:
    """From 5 summed counts (5, *) to 3 metrics (3, *); NaN of nothing."""
    foreground, foreground_right, rois, right, loss = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([100 * foreground_right / foreground, 100 * right / rois, loss / rois])
