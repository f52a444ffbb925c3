"""Which findings prescribe which treatment, and why that may harm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .findings import Finding, Recompute


class Kind(NamedTuple):
    """Attributes:
    name: what is done.
    rules: of the findings that it is to mend.
    may_harm: where and why.
    """

    name: str
    rules: tuple[str, ...]
    may_harm: str


RECOMPUTED = Kind(
    "recomputed statistics",
    (),  # by the words of a finding
    "it may harm where the images are few or of another kind than those that the model is for, and "
    "where the fault is in the weights",
)
PER_LEVEL = Kind(
    "recomputed statistics, for each level its own",
    ("BN202",),
    "it may harm where a level has too few values for statistics of its own",
)
FROZEN = Kind(
    "recomputed statistics, of frozen layers, too",
    ("BN304",),
    "it may harm, as the weights behind frozen layers have been trained with their statistics",
)
UNBIASED = Kind(
    "statistics without the start's values",
    ("BN106",),
    "it may harm where the counter is of another training than the statistics",
)
LARGER_EPS = Kind(
    "eps 0.001",
    ("BN110", "BN404"),
    "it may harm where the model was trained with eps 1e-05",
)
SMALLER_EPS = Kind(
    "eps 1e-05",
    ("BN110", "BN404"),
    "it may harm where the model was trained with a larger eps",
)
PER_LEVEL_AND_FROZEN = Kind(
    "recomputed statistics, for each level its own, of frozen layers, too",
    ("BN202", "BN304"),
    f"{PER_LEVEL.may_harm}; and {FROZEN.may_harm.removeprefix('it may harm, ')}",
)
KINDS = (RECOMPUTED, PER_LEVEL, FROZEN, PER_LEVEL_AND_FROZEN, UNBIASED, LARGER_EPS, SMALLER_EPS)
"""Those that are tried on images of the source."""

ADAPTED = Kind(
    "the target's statistics (AdaBN), on the target",
    ("BN205",),
    "it may harm where what is in the images is shifted, and not their look alone: on another "
    "laboratory's photographs red blood cells gained AP and white ones lost it",
)


def kinds_of(of: Finding, recompute: Recompute) -> list[Kind]:
    """What a finding prescribes; recomputed statistics by its words, and before all others."""
    words = (recompute.usual, recompute.initial)
    usual = [RECOMPUTED] if any(of_words in of.treatment for of_words in words) else []
    return usual + [kind for kind in (*KINDS, ADAPTED) if of.rule in kind.rules]


def untried(findings: Iterable[Finding], recompute: Recompute) -> list[Finding]:
    """Findings with why their treatments may harm, where there is one, and nothing was tried."""
    found = []
    for of in findings:
        kind = next(iter(kinds_of(of, recompute)), None)
        found.append(of._replace(untried=kind.may_harm) if kind else of)
    return found
