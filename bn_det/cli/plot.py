"""Plot a metric of several runs over training, from their metrics.json.

Each RUN is LABEL=OUTPUT_DIR, or PANEL/LABEL=OUTPUT_DIR to put it into a panel of its own. Runs of
the same label have the same colour.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..commands.results import read_metrics
from ..errors import InputError, nearest
from ..files import check_writable, write_aside

LARGEST = 1e30
"""What an axis can show; a loss that large is none."""

PICTURES = (".png", ".svg", ".pdf")


def read_metric(folder: str, metric: str) -> tuple[list[int], list[float]]:
    """Iterations, counted from 1, and values; of an iteration that was repeated, the last.

    NaN, the value of what could not be measured, is left out; a line counts it.
    """
    path = Path(folder) / "metrics.json"
    try:
        lines = read_metrics(folder)
        found = [(line["iteration"], line[metric]) for line in lines if metric in line]
        known = {name for line in lines for name in line}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{path}: is not the metrics.json of a run: {e}") from e
    if not found:
        raise InputError(f"--metric: {path} has no {metric!r}; {nearest(metric, known)}")
    for iteration, value in found:
        is_number = type(value) in (int, float) and not abs(value) > LARGEST
        if not (type(iteration) is int and 0 <= iteration < LARGEST and is_number):
            raise InputError(
                f"{path}: {metric}: {value!r} of iteration {iteration!r} is not accepted; use "
                "finite numbers"
            )
    measured = [(int(iteration) + 1, value) for iteration, value in found if not math.isnan(value)]
    if not measured:
        raise InputError(f"{path}: {metric} is NaN throughout; name a metric that was measured")
    if len(measured) < len(found):
        print(f"{path}: {metric} is NaN {len(found) - len(measured)} times, which is left out")
    return [iteration for iteration, _ in measured], [value for _, value in measured]


def parse_run(text: str) -> tuple[str, str, str]:
    """Panel, label and folder."""
    label, separator, folder = text.partition("=")
    if not (separator and label and folder):
        raise InputError(f"RUN: {text!r} is not accepted; use LABEL=OUTPUT_DIR")
    panel, _, label = label.rpartition("/")
    return panel, label, folder


def draw(runs: list[tuple[str, str, str]], metric: str) -> Figure:
    """A panel beside the other, with one scale for all."""
    panels = list(dict.fromkeys(panel for panel, _, _ in runs))
    labels = list(dict.fromkeys(label for _, label, _ in runs))
    figure = Figure(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, label, folder in runs:
        iterations, values = read_metric(folder, metric)
        colour = matplotlib.colormaps["tab10"](labels.index(label) % 10)
        axis = axes[panels.index(panel)]
        axis.plot(iterations, values, marker="o", markersize=3, color=colour, label=_plain(label))
    for panel, axis in zip(panels, axes, strict=True):
        axis.set(title=_plain(panel), xlabel="iterations")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel(_plain(metric))
    return figure


def _plain(text: str) -> str:
    """A text in which matplotlib looks for no formula, and that legends do not leave out."""
    return text.replace("$", r"\$").replace("_", " _", 1 if text.startswith("_") else 0)


def main(prog: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="LABEL=OUTPUT_DIR")
    parser.add_argument("--metric", default="bbox/AP", help="its name in metrics.json")
    parser.add_argument("--output", required=True, help="the picture to write: PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if output.suffix not in PICTURES:
        raise InputError(f"--output: {args.output!r} is not accepted; use {', '.join(PICTURES)}")
    check_writable("--output", output.parent)
    figure = draw([parse_run(text) for text in args.runs], args.metric)
    with write_aside(output) as aside:
        figure.savefig(aside, format=output.suffix[1:], dpi=120)
    print(f"{output}: {args.metric} of {len(args.runs)} runs")
