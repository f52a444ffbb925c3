"""Whether it is the statistics: recomputed ones, judged on images apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .findings import Finding, Recompute, Tried
from .from_losses import Compared
from .losses import Values, put, statistics_of
from .modes import in_mode

Score = Callable[[nn.Module], float]
"""Of a model in evaluation mode, such as its AP: higher is better."""


def try_statistics(
    model: nn.Module, statistics: Values, losses: Compared, score: Score | None
) -> Tried:
    """What a model gains by other statistics; it is left with its own.

    Args:
        score: None to judge by the losses.
    """
    if score is None:
        return Tried("loss", float(losses.old.mean()), float(losses.new.mean()), False)
    own = statistics_of(model)
    with in_mode(model, training=False):
        before = score(model)
        try:
            put(model, statistics)
            after = score(model)
        finally:
            put(model, own)
    return Tried("AP", before, after, False)


def with_gain(findings: Sequence[Finding], tried: Tried, recompute: Recompute) -> list[Finding]:
    """Findings that recomputed statistics are to mend, with what they have brought."""
    return [
        of._replace(gain=tried.gain) if recompute.is_in(of.treatment) else of for of in findings
    ]


def is_mended(findings: Sequence[Finding]) -> bool:
    """Whether recomputed statistics mend anything that is wrong."""
    return any(of.gain is not None and of.gain > 0 for of in findings)
