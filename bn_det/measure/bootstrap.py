"""Measures by population and by batch statistics, with confidence intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from ..layers import BatchNorm2d
from ..layers.batch_norm import STATISTICS
from ..layers.blocks import evaluated_with
from ..population.progress import with_progress

logger = logging.getLogger(__name__)

NUM_RESAMPLES = 2000
"""For the confidence intervals."""

T = TypeVar("T")


class Estimate(NamedTuple):
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@torch.no_grad()
def by_statistics(
    batches: Iterable[T],
    num_batches: int,
    module: nn.Module,
    message: str,
    count: Callable[[T], Iterable[float]],
    metrics: Callable[[np.ndarray], np.ndarray],
) -> dict[str, list[Estimate]]:
    """Measure with the population statistics of a module and with those of each batch.

    Args:
        num_batches: for the time left.
        module: whose normalization is meant, in evaluation mode.
        message: of the progress, as in ``with_progress``.
        count: of a batch, k numbers that are summed over batches.
        metrics: from such sums, shape (n, k), to metrics, shape (n, m).

    Returns:
        ``{"population": m estimates, "batch": ..., "batch - population": ...}``; only the first for
        a module without batch statistics. The intervals are bootstrapped over batches, and the same
        resamples serve all: what is in a batch is not independent, and differences are paired.
    """
    has_batch = any(isinstance(m, BatchNorm2d) for m in module.modules())
    counts = {s: [] for s in (STATISTICS if has_batch else STATISTICS[:1])}
    for batch in with_progress(batches, num_batches, logger, message):
        for statistics, rows in counts.items():
            with evaluated_with(module, statistics):
                rows.append(list(count(batch)))
    return _estimates({s: np.array(rows) for s, rows in counts.items()}, metrics)


def _estimates(
    counts: dict[str, np.ndarray], metrics: Callable[[np.ndarray], np.ndarray]
) -> dict[str, list[Estimate]]:
    num_batches = len(counts["population"])
    resamples = np.random.default_rng(0).integers(num_batches, size=(NUM_RESAMPLES, num_batches))
    # The first row is the data itself.
    chosen = np.concatenate([np.arange(num_batches)[None], resamples])
    found = {s: metrics(rows[chosen].sum(1)) for s, rows in counts.items()}
    if "batch" in found:
        found["batch - population"] = found["batch"] - found["population"]
    return {s: [_estimate(column) for column in values.T] for s, values in found.items()}


def _estimate(values: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))
