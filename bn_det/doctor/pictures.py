"""Pictures over depth of what passes measured in each layer: inline SVG of a page.

Positions along the depth are percentages and heights are pixels, so that a picture of any width
has letters and lines of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from statistics import median
from typing import NamedTuple, TypeGuard

from .findings import Measures, Report, Shift

_TOP, _BOTTOM = 38, 146
"""Pixels from the top, between which bars are; above them are ranks, below them marks."""

_RANKED = 5
"""Layers that are named."""

_ROWS = 3
"""Of their ranks, as a digit is wider than a bar of many."""

_NICE = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
"""A scale ends at such a number, times a power of ten."""

_TIMES_USUAL = 5
"""A bar is cut that is so many times as long as the usual one of those that stand out."""


class Picture(NamedTuple):
    """Of one quantity, in the order in which layers are called.

    Attributes:
        title, says: what is seen.
        names: of layers.
        values: None for a layer that has none.
        limits: what chance explains; empty where that is not known.
        bad: which layers are marked.
    """

    title: str
    says: str
    names: list[str]
    values: Sequence[float | None]
    limits: list[float]
    bad: list[bool]


def pictures(report: Report) -> Iterator[str]:
    """As HTML; none without passes."""
    if report.layers or report.on_target:
        yield "<h2>Over depth: one bar a layer, in the order in which they are called</h2>"
        yield '<div class="pictures">'
        yield from (_figure(of) for of in _pictures(report))
        yield "</div>"


def _pictures(report: Report) -> Iterator[Picture]:
    layers = report.layers
    names = [of.name for of in layers]
    if layers:
        yield from _shifts(
            layers,
            "Shift of the mean",
            "Of the population statistics, from those of the passes, in standard deviations.",
            "Shift of the variance",
        )
        yield Picture(
            "Noise of a normalization batch",
            "By how much its mean varies from batch to batch, in standard deviations.",
            names,
            [of.noise for of in layers],
            [],
            [False] * len(layers),
        )
    if any(of.share is not None for of in layers):
        yield _levels(report, names)
    if report.in_evaluation:
        yield from _shifts(
            report.in_evaluation,
            "Estimation shift of the mean",
            "Of the population statistics, from those of what layers see in evaluation, in "
            "standard deviations.",
            "Estimation shift of the variance",
        )
    if report.on_target:
        yield from _shifts(
            report.on_target,
            "Domain shift of the mean",
            "Of the statistics on the target's images, from those on the source's, in standard "
            "deviations.",
            "Domain shift of the variance",
        )


def _shifts(
    layers: Sequence[Shift | Measures], of_mean: str, says: str, of_variance: str
) -> Iterator[Picture]:
    names = [of.name for of in layers]
    shaded = "The shade is what chance explains; bars that leave it are marked."
    for title, of_title, values, chances in (
        (of_mean, says, [of.mean_shift for of in layers], [of.mean_chance for of in layers]),
        (
            of_variance,
            "The same of the variance, relative to it.",
            [of.var_shift for of in layers],
            [of.var_chance for of in layers],
        ),
    ):
        limits = [of.bound * chance for of, chance in zip(layers, chances, strict=True)]
        # What is not a number is not within a limit.
        bad = [not v <= limit for v, limit in zip(values, limits, strict=True)]
        yield Picture(title, f"{of_title} {shaded}", names, values, limits, bad)


def _levels(report: Report, names: list[str]) -> Picture:
    found = {name for of in report.findings if of.rule == "BN202" for name in of.where}
    return Picture(
        "Between-level share of the variance",
        "Of layers that are called several times a pass: what lies between the calls. Marked where "
        "that is more than chance.",
        names,
        [of.share for of in report.layers],
        [],
        [name in found for name in names],
    )


def _figure(of: Picture) -> str:
    top = _scale(of)
    number = len(of.names)
    ranks = _ranks(of)
    bars = "".join(_bar(of, k, top) for k in range(number))
    digits = "".join(
        f'<text class="rank" x="{_middle(k, number)}" y="{_TOP - 5 - 11 * (j % _ROWS)}">'
        f"{ranks[k]}</text>"
        for j, k in enumerate(sorted(ranks))
    )
    marked = f"{sum(of.bad)} of {number} layers are marked"
    grid = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        for y in (_y(top, top), _y(top / 2, top), _BOTTOM)
    )
    ticks = "".join(
        f'<text x="34" y="{_y(v, top) + 4:.1f}">{v:g}</text>' for v in (top, top / 2, 0)
    )
    return (
        f"<figure>\n<figcaption><strong>{of.title}</strong>"
        f'<span class="small">{of.says}</span></figcaption>\n'
        f'<div class="plot"><svg class="axis" aria-hidden="true">{ticks}</svg>'
        f'<svg class="bars" role="img" aria-label="{of.title}: {marked}">{grid}{bars}{digits}</svg>'
        "</div>\n"
        f'<div class="depth small"><code>{escape(of.names[0])}</code>'
        f"<code>{escape(of.names[-1])}</code></div>\n"
        f"{_legend(of, ranks)}</figure>"
    )


def _scale(of: Picture) -> float:
    """The value of a bar of full length."""
    values = [v for v in of.values if _is_finite(v)]
    bad = [v for v, is_bad in zip(of.values, of.bad, strict=True) if is_bad and _is_finite(v)]
    top = max(values, default=0.0)
    if bad:
        top = min(top, _TIMES_USUAL * median(bad))
    top = max(top, *filter(_is_finite, of.limits), 0.0, 0.0)
    if not top > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    # The least numbers of all have no power of ten below them.
    return next((times * power for times in _NICE if times * power >= top * 0.999), top)


def _is_finite(v: float | None) -> TypeGuard[float]:
    return v is not None and math.isfinite(v)


def _y(v: float, top: float) -> float:
    """Pixels from the top at which a bar ends; what is no number goes the whole way."""
    share = v / top if v < top else 1.0
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _middle(k: int, number: int) -> str:
    return f"{100 * (k + 0.5) / number:.3f}%"


def _bar(of: Picture, k: int, top: float) -> str:
    v = of.values[k]
    step = 100 / len(of.names)
    left = k * step
    across = f'x1="{left:.3f}%" x2="{left + step:.3f}%"'
    parts = [f"<title>{escape(of.names[k])}: {_number(v)}{_explained(of, k)}</title>"]
    if of.limits:
        parts.append(_rect("chance", left, step, _y(of.limits[k], top)))
    if v is not None:
        kind = "bad" if of.bad[k] else "bar"
        parts.append(_rect(kind, left + step / 8, step * 0.75, _y(v, top)))
        if not v <= top:
            parts.append(f'<line class="cut" {across} y1="{_TOP + 10}" y2="{_TOP + 6}"/>')
    if of.limits:
        y = _y(of.limits[k], top)
        parts.append(f'<line class="bound" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
    if of.bad[k]:
        x = _middle(k, len(of.names))
        y = _BOTTOM + 4
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{y}" y2="{y + 8}"/>')
    return f"<g>{''.join(parts)}</g>\n"


def _rect(kind: str, left: float, width: float, y: float) -> str:
    height = max(_BOTTOM - y, 1.0)
    return (
        f'<rect class="{kind}" x="{left:.3f}%" width="{width:.3f}%" y="{_BOTTOM - height:.1f}" '
        f'height="{height:.1f}"/>'
    )


def _ranks(of: Picture) -> dict[int, int]:
    """The numbers, from 1, of the worst that are marked."""
    bad = [k for k in range(len(of.names)) if of.bad[k]]
    bad.sort(key=lambda k: (_is_finite(of.values[k]), -_size(of.values[k])))
    return {k: rank for rank, k in enumerate(bad[:_RANKED], 1)}


def _size(v: float | None) -> float:
    return v if _is_finite(v) else 0.0


def _legend(of: Picture, ranks: dict[int, int]) -> str:
    """The names of the worst, or of the largest where none is marked."""
    if ranks:
        rows = (f"<li>{_named(of, k)}</li>" for k in ranks)
        return f"<ol>{''.join(rows)}</ol>{_rest(sum(of.bad) - len(ranks))}"
    largest = max(range(len(of.names)), key=lambda k: _size(of.values[k]))
    return f'<p class="small">The largest: {_named(of, largest)}</p>'


def _rest(number: int) -> str:
    return f'<p class="small">and {number} more, marked below their bars</p>' if number else ""


def _named(of: Picture, k: int) -> str:
    name = escape(of.names[k] or "the module")
    return f"<code>{name}</code> {_number(of.values[k])}{_explained(of, k)}"


def _number(v: float | None) -> str:
    if v is None:
        return "none"
    return f"{v:.3g}" if math.isfinite(v) else "not finite"


def _explained(of: Picture, k: int) -> str:
    return f" (chance: up to {_number(of.limits[k])})" if of.limits else ""
