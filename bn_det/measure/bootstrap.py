"""Measures by population and by batch statistics, with confidence intervals."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from ..errors import InputError, number
from ..layers.batch_norm import STATISTICS
from ..layers.blocks import evaluated_with
from ..layers.freeze import is_frozen
from ..layers.kinds import batch_norms
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

    def text(self, digits: str) -> str:
        """For a table, with the interval where there is one."""
        value = number(self.value, digits)
        if not math.isfinite(self.value):
            return value
        return f"{value} [{number(self.low, digits)}, {number(self.high, digits)}]"


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
        metrics: from such sums, shape (k, *), to metrics, shape (m, *); NaN where one is undefined.

    Returns:
        ``{"population": m estimates, "batch": ..., "batch - population": ...}``; only the first for
        a module without batch statistics. The intervals are bootstrapped over batches, and the same
        resamples serve all: what is in a batch is not independent, and differences are paired.
        They are of the resamples in which a metric is defined.

    Raises:
        InputError: there is no batch; or, of what normalizes by batches, a layer cannot be told to
            (:func:`bn_det.evaluated_with`).
    """
    has_batch = any(not is_frozen(layer) for layer in batch_norms(module))
    kinds = STATISTICS if has_batch else STATISTICS[:1]
    counts: dict[str, list[list[float]]] = {s: [] for s in kinds}
    for batch in with_progress(batches, num_batches, logger, message):
        for statistics, rows in counts.items():
            with evaluated_with(module, statistics):
                rows.append(list(count(batch)))
    if not counts[STATISTICS[0]]:
        raise InputError("batches: there is none to measure on")
    return _estimates({s: np.array(rows) for s, rows in counts.items()}, metrics)


def _estimates(
    counts: dict[str, np.ndarray], metrics: Callable[[np.ndarray], np.ndarray]
) -> dict[str, list[Estimate]]:
    def values(rows: np.ndarray, axis: int) -> np.ndarray:
        found = np.stack([metrics(sums) for sums in rows.sum(axis)])
        return np.concatenate([found, np.diff(found, axis=0)])

    rows = np.stack(list(counts.values()))  # statistics x batches x k
    names = [*counts, *(f"{b} - {a}" for a, b in pairwise(counts))]
    with np.errstate(invalid="ignore"):  # of losses that are infinite
        estimates = np.stack([values(rows, axis=1), *_interval(rows, values)], axis=-1).tolist()
    return {
        name: [Estimate(*estimate) for estimate in of_name]
        for name, of_name in zip(names, estimates, strict=True)
    }


def _interval(rows: np.ndarray, values: Callable[..., np.ndarray]) -> np.ndarray:
    """The ends, stacked, of the 95 % intervals of values, bootstrapped over axis 1 of the rows."""
    # Not for a command's help: it takes a second to import.
    from scipy.stats import DegenerateDataWarning, bootstrap

    if rows.shape[1] == 1:  # which scipy refuses to resample
        return np.stack([values(rows, axis=1)] * 2)
    with warnings.catch_warnings():
        # Of an interval of its own, which a resample without a metric makes NaN.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # where no resample has one
        # By a hundred resamples at a time: thousands of batches would take a gigabyte.
        found = bootstrap((rows,), values, n_resamples=NUM_RESAMPLES, batch=100, axis=1,
                          method="percentile", rng=0)  # fmt: skip
        return np.nanpercentile(found.bootstrap_distribution, [2.5, 97.5], axis=-1)
