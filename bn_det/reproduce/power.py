"""How many seeds a claim takes, by the spread of those there are."""

from __future__ import annotations

import math
from statistics import stdev

from .claims import Claim
from .verdicts import Verdict

POWER = 0.9

MOST = 1000
"""Seeds, beyond which it does not matter how many."""


def seeds_needed(claim: Claim, verdict: Verdict, confidence: float = 0.95) -> int | None:
    """Seeds with which the smallest effect that counts is told from none in 9 of 10 repetitions.

    The interval of a t-test excludes no effect with that probability where the true effect is the
    smallest that counts (noncentral t); of a claim that says "at most", it excludes that where
    there is none. The spread is that of the effects, which three seeds tell to a factor of two or
    so.

    Returns:
        None where there is no spread, of less than two seeds, or more than MOST are needed.
    """
    from scipy.stats import nct, t  # not for a command's help: it takes a second to import

    if len(verdict.effects) < 2:
        return None
    spread = stdev(verdict.effects)
    if spread == 0:
        return None

    def is_enough(number: int) -> bool:
        bound = float(t.ppf((1 + confidence) / 2, number - 1))
        return (
            float(nct.sf(bound, number - 1, claim.smallest / spread * math.sqrt(number))) >= POWER
        )

    few, many = 1, MOST + 1  # not enough; enough
    while many - few > 1:
        number = (few + many) // 2
        few, many = (few, number) if is_enough(number) else (number, many)
    return many if many <= MOST else None
