"""What comes out of a claim, by the effects of its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from .claims import Claim


class Verdict(NamedTuple):
    """What came out of a claim.

    Attributes:
        effects: of each seed that counts.
        mean: their mean.
        low, high: its confidence interval (Student's t over seeds, which are paired: each effect is
            of runs with one seed); None with one seed, or with the same effect in all.
        word: "seen", "opposite", "absent" or "not seen"; "hint" with one seed, which tells of no
            seed but itself; "" if nothing that counts has been measured.
        seeds: those of the effects.
        left_out: seeds that do not count.
        unknown: seeds whose effect is not known.
    """

    effects: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    word: str
    seeds: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()


def judge(claim: Claim, effects: Sequence[float], confidence: float = 0.95) -> Verdict:
    """The verdict on a claim, by the effects of the seeds that count.

    With several seeds a claim is seen if the mean effect is at least the smallest that counts and
    the interval is above zero, opposite if that holds of the effect's negative, and absent if the
    whole interval is of effects that are too small to count; else it is not seen, which says
    nothing. One that says "at most" is seen if the whole interval is at most that, opposite if all
    of it is above. With one seed there is no interval, and no verdict. Effects that are all the
    same, as of a metric of few values, tell of no spread: the claim is not seen.
    """
    if not effects:
        return Verdict((), math.nan, None, None, "")
    if len(effects) == 1:
        return Verdict(tuple(effects), effects[0], None, None, "hint")
    if len(set(effects)) == 1:
        return Verdict(tuple(effects), effects[0], None, None, "not seen")
    centre, low, high = _interval(effects, confidence)
    if claim.at_most:
        word = "seen" if high <= claim.smallest else "opposite" if low > claim.smallest else ""
    elif centre >= claim.smallest and low > 0:
        word = "seen"
    elif centre <= -claim.smallest and high < 0:
        word = "opposite"
    else:
        word = "absent" if -claim.smallest < low and high < claim.smallest else ""
    return Verdict(tuple(effects), centre, low, high, word or "not seen")


def _interval(effects: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean, and the ends of its confidence interval."""
    from scipy.stats import t  # not for a command's help: it takes a second to import

    centre, number = mean(effects), len(effects)
    half = float(t.ppf((1 + confidence) / 2, number - 1)) * stdev(effects) / math.sqrt(number)
    return centre, centre - half, centre + half
