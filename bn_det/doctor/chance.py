"""What chance explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

FALSE_ALARMS = 0.01
"""Of an examination or of a training of a healthy model, by one rule."""


def bound_of(num_batches: int, num_tests: int) -> float:
    """The ratio of a difference to its standard error that chance alone does not reach.

    Student's, for a difference of either sign, over all tests that a rule makes.
    """
    from scipy.stats import t  # only for this: the layers need torch alone

    return float(t.isf(FALSE_ALARMS / (2 * num_tests), max(num_batches - 1, 1)))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; infinite for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
