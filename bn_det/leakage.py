"""How much a RoI head with BatchNorm reads from the other RoIs of its batch.

In training, the RoIs that normalize each other come from one or two images and are alike; a head
can learn to take the batch as a hint (Wu & Johnson, Sec. 6). AP with batch statistics does not
show it by itself, because at test time the RoIs of an image are distributed otherwise than those
sampled for training. So here RoIs of held-out images are sampled as in training, and classified
twice: with batch and with population statistics. What the batch gives beyond the population on
new images, it gives as a hint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from yacs.config import CfgNode

from .checkpoint import write_aside
from .errors import choose
from .layers import BatchNorm2d
from .layers.batch_norm import STATISTICS, evaluated_with
from .progress import with_progress

logger = logging.getLogger(__name__)

METRICS = ("foreground accuracy", "accuracy", "loss")
"""Of the classification of RoIs, background a class: percent, percent, mean cross entropy."""

NUM_RESAMPLES = 2000
"""For the confidence intervals."""


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


class Estimate(NamedTuple):
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def check_architecture(cfg: CfgNode) -> None:
    """Raise InputError unless the config's detector has a box head that RoIs are sampled for."""
    accepted = ["GeneralizedRCNN", "BNGeneralizedRCNN"]
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, accepted)
    choose("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, ["StandardROIHeads"])


@torch.no_grad()
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
    has_batch = any(isinstance(m, BatchNorm2d) for m in head.modules())
    counts = {s: [] for s in (STATISTICS if has_batch else STATISTICS[:1])}
    message = "Classified the RoIs of %d/%d batches"
    for batch in with_progress(batches, num_batches, logger, message):
        for statistics, rows in counts.items():
            with evaluated_with(head, statistics):
                rows.append(_count(classify(batch.features), batch))
    return _estimates({s: np.array(rows) for s, rows in counts.items()})


def leakage_table(results: dict[str, dict[str, Estimate]]) -> str:
    """For the terminal."""
    rows = [
        [name, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in estimates.values())]
        for name, estimates in results.items()
    ]
    table = tabulate(rows, headers=["statistics", *METRICS], tablefmt="pipe")
    if "batch" not in results:
        table += "\nThe head has no batch statistics: nothing can leak by them."
    return table


def save_leakage(results: dict[str, dict[str, Estimate]], path: Path) -> None:
    """As JSON, each estimate with its value, low and high."""
    content = {s: {m: e._asdict() for m, e in of_s.items()} for s, of_s in results.items()}
    with write_aside(path) as aside:
        Path(aside).write_text(json.dumps(content, indent=1))


def _count(logits: Tensor, batch: RoIBatch) -> list[float]:
    """Foreground RoIs, those of them that are right, all RoIs, those right, summed loss."""
    right = logits.argmax(1) == batch.labels
    foreground = batch.labels != batch.background
    loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
    counts = [foreground.sum(), (right & foreground).sum(), right.numel(), right.sum(), loss]
    return [float(c) for c in counts]


def _estimates(counts: dict[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    num_batches = len(counts["population"])
    resamples = np.random.default_rng(0).integers(num_batches, size=(NUM_RESAMPLES, num_batches))
    # The first row is the data itself.
    chosen = np.concatenate([np.arange(num_batches)[None], resamples])
    metrics = {s: _metrics(rows[chosen].sum(1)) for s, rows in counts.items()}
    if "batch" in metrics:
        metrics["batch - population"] = metrics["batch"] - metrics["population"]
    return {
        s: {name: _estimate(values[:, i]) for i, name in enumerate(METRICS)}
        for s, values in metrics.items()
    }


def _metrics(sums: np.ndarray) -> np.ndarray:
    """From (resamples, 5) summed counts to (resamples, 3) metrics; NaN of nothing."""
    foreground, foreground_right, rois, right, loss = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack(
            [100 * foreground_right / foreground, 100 * right / rois, loss / rois], axis=1
        )


def _estimate(values: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))
