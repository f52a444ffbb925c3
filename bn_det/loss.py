"""The loss of a detector with population and with batch statistics, on the same images.

Losses of a training are of other weights at each step, of augmented images, and of batch
statistics. Wu & Johnson, *Rethinking "Batch" in BatchNorm*, tell three errors apart instead: of
the training set and of the validation set, the latter by population statistics and by those of
batches as training has them. For a dense detector they are here, in terms of its loss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from yacs.config import CfgNode

from .checkpoint import write_aside
from .errors import choose
from .layers import BatchNorm2d
from .layers.batch_norm import STATISTICS, evaluated_with
from .leakage import NUM_RESAMPLES, Estimate
from .parts import DENSE
from .progress import with_progress

logger = logging.getLogger(__name__)


class WeightedLoss(NamedTuple):
    """The loss of a batch, a mean over ``weight`` units: positive anchors, or images."""

    loss: float
    weight: float


def check_dense(cfg: CfgNode) -> None:
    """Raise InputError unless the config's detector is one whose losses need no sampling."""
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, DENSE)


@torch.no_grad()
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
    has_batch = any(isinstance(m, BatchNorm2d) for m in model.modules())
    found = {s: [] for s in (STATISTICS if has_batch else STATISTICS[:1])}
    for batch in with_progress(batches, num_batches, logger, "Losses of %d/%d batches"):
        for statistics, losses in found.items():
            with evaluated_with(model, statistics):
                losses.append(loss_of(batch))
    return _estimates({s: np.array(losses, dtype=float) for s, losses in found.items()})


def _estimates(found: dict[str, np.ndarray]) -> dict[str, Estimate]:
    number = len(found["population"])
    resamples = np.random.default_rng(0).integers(number, size=(NUM_RESAMPLES, number))
    chosen = np.concatenate([np.arange(number)[None], resamples])  # first the data itself
    means = {}
    for statistics, rows in found.items():
        loss, weight = rows[chosen].transpose(2, 0, 1)
        means[statistics] = (loss * weight).sum(1) / weight.sum(1)
    if "batch" in means:
        means["batch - population"] = means["batch"] - means["population"]
    ends = {s: np.percentile(values[1:], [2.5, 97.5]) for s, values in means.items()}
    return {s: Estimate(float(v[0]), *(float(e) for e in ends[s])) for s, v in means.items()}


def loss_table(results: dict[str, Estimate]) -> str:
    """For the terminal."""
    rows = [[name, f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"] for name, e in results.items()]
    return tabulate(rows, headers=["statistics", "loss"], tablefmt="pipe")


def save_loss(results: dict[str, Estimate], path: Path) -> None:
    """As JSON, each estimate with its value, low and high."""
    with write_aside(path) as aside:
        Path(aside).write_text(json.dumps({s: e._asdict() for s, e in results.items()}, indent=1))
