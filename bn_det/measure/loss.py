"""The loss of a detector with population and with batch statistics, on the same images.

Losses of a training are of other weights at each step, of augmented images, and of batch
statistics. Wu & Johnson, *Rethinking "Batch" in BatchNorm*, tell three errors apart instead: of
the training set and of the validation set, the latter by population statistics and by those of
batches as training has them. For a dense detector they are here, in terms of its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate
from torch import nn
from yacs.config import CfgNode

from ..config.parts import DENSE
from ..errors import choose
from ..files import finite, write_json
from .bootstrap import Estimate, by_statistics


class WeightedLoss(NamedTuple):
    """The loss of a batch, a mean over ``weight`` units: positive anchors, or images."""

    loss: float
    weight: float


def check_dense(cfg: CfgNode) -> None:
    """Raise InputError unless the config's detector is one whose losses need no sampling."""
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, DENSE)


def measure_loss(
    batches: Iterable[Any],
    num_batches: int,
    model: nn.Module,
    loss_of: Callable[[Any], WeightedLoss],
) -> dict[str, Estimate]:
    """The loss by the population statistics of a model and by those of each batch.

    Args:
        batches: of the host's loader; all of a batch make one normalization batch.
        num_batches: for the time left.
        model: in evaluation mode.
        loss_of: the loss of the model on a batch, its layers in evaluation mode.

    Returns:
        ``{"population": estimate, "batch": ..., "batch - population": ...}``; only the first for a
        model without batch statistics. Means over the units of all batches, with intervals that
        are bootstrapped over batches; the same resamples serve all.
    """
    message = "Losses of %d/%d batches"
    found = by_statistics(
        batches, num_batches, model, message, lambda b: _sums(loss_of(b)), _mean_loss
    )
    return {statistics: estimate for statistics, (estimate,) in found.items()}


def _sums(of_batch: WeightedLoss) -> tuple[float, float]:
    return of_batch.loss * of_batch.weight, of_batch.weight


def _mean_loss(sums: np.ndarray) -> np.ndarray:
    return sums[:1] / sums[1:]


def loss_table(results: dict[str, Estimate]) -> str:
    """For the terminal."""
    rows = [[name, e.text(".4f")] for name, e in results.items()]
    return tabulate(rows, ["statistics", "loss"], tablefmt="pipe", disable_numparse=True)


def save_loss(results: dict[str, Estimate], path: Path) -> None:
    """As JSON, each estimate with its value, low and high; null for what is not finite."""
    write_json(path, finite({s: e._asdict() for s, e in results.items()}))
