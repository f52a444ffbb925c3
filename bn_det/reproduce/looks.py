"""When the claims are looked at, and how sure an interval then has to be.

Who adds seeds until an interval says something has looked several times, and would be wrong more
often than one interval of 95 % is. So the looks are fixed beforehand, and each has an interval of
1 - 0.05 / looks: all of them hold together with 95 % (Bonferroni), whenever one stops.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import InputError
from .claims import Claim
from .verdicts import Verdict

DEFAULT_SEEDS = 3
"""One is a hint, and two have an interval of 13 standard deviations."""

_SEEDS = (3, 5, 8, 12)
"""After which --decide looks: each time half as many again, about."""

_ALPHA = 0.05

DECIDED = ("seen", "opposite", "absent")


class Looks(NamedTuple):
    """Attributes:
    seeds: how many there are at each look.
    confidence: of the interval at each.
    """

    seeds: tuple[int, ...]
    confidence: float

    @property
    def are_several(self) -> bool:
        return len(self.seeds) > 1


def looks_of(args: argparse.Namespace) -> Looks:
    """One, or with ``--decide`` several.

    Raises:
        InputError: the most seeds of ``--decide`` are too few to look twice.
    """
    if not args.decide:
        return Looks((args.seeds or DEFAULT_SEEDS,), 1 - _ALPHA)
    most = args.seeds or _SEEDS[-1]
    if most <= _SEEDS[0]:
        raise InputError(
            f"--seeds: {most} is not accepted with --decide, for which it is the most; use "
            f"{_SEEDS[0] + 1} or more, or leave it out ({_SEEDS[-1]})"
        )
    seeds = (*(n for n in _SEEDS if n < most), most)
    return Looks(seeds, 1 - _ALPHA / len(seeds))


def undecided(
    names: Iterable[str], claims: Iterable[Claim], decided: Mapping[str, Verdict]
) -> list[str]:
    """The experiments that have claims which are not decided yet."""
    left = {claim.experiment for claim in claims if claim.name not in decided}
    return [name for name in names if name in left]
