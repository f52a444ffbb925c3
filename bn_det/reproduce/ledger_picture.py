"""The ledger as a picture: a line for each claim."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .claims import Claim
from .results import Picture
from .verdicts import Verdict

_COLOURS = {"seen": "#2e7d32", "opposite": "#c62828", "absent": "#1565c0"}
"""Of verdicts; what says nothing is grey."""


def ledger_picture(ledger: Sequence[tuple[Claim, Verdict]], confidence: float) -> Picture | None:
    """Effects, each in units of the smallest that counts for its claim; None where there are none.

    A dot for each seed, and a bar for the interval.
    """
    known = [(claim, verdict) for claim, verdict in ledger if verdict.effects]
    if not known:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(known)), layout="constrained")
    axis = figure.subplots()
    for y, (claim, verdict) in enumerate(reversed(known)):
        _draw(axis, y, claim, verdict)
    labels = [f"{c.name} ({v.word})" for c, v in reversed(known)]
    axis.set_yticks(range(len(known)), labels, fontsize=8)
    axis.axvspan(-1, 1, color="#eeeeee", zorder=0)
    axis.axvline(0, color="#888888", lw=0.8)
    axis.set_xscale("symlog", linthresh=2)
    ticks = [x for x in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if _is_in(x, axis)]
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel("effect, in units of the smallest that counts (grey: too small to count)")
    axis.grid(axis="x", alpha=0.3)
    caption = (
        f"Each claim's effect: a dot for each seed, a stroke for the mean, a bar for the "
        f"{100 * confidence:g} % interval; the scale is linear to 2, and logarithmic from there on."
    )
    if any(claim.at_most for claim, _ in known):
        caption += " A claim of 'at most' is seen where the bar ends in the grey or left of it."
    return Picture("ledger", caption, figure)


def _draw(axis: Axes, y: int, claim: Claim, verdict: Verdict) -> None:
    colour = _COLOURS.get(verdict.word, "#777777")
    if verdict.low is not None and verdict.high is not None:
        ends = [verdict.low / claim.smallest, verdict.high / claim.smallest]
        axis.plot(ends, [y, y], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
    scaled = [effect / claim.smallest for effect in verdict.effects]
    axis.plot(scaled, [y] * len(scaled), "o", color=colour, markersize=4)
    axis.plot(verdict.mean / claim.smallest, y, "|", color=colour, markersize=12, mew=2)


def _is_in(x: float, axis: Axes) -> bool:
    low, high = axis.get_xlim()
    return low <= x <= high
