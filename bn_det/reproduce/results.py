"""What the steps of a report have left on the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..commands.results import read_metrics
from ..errors import InputError, reason_of
from ..files import read_json
from ..training.spikes import FILE, read_spikes
from .runner import Outcome
from .steps import Setting, Step, Training, training_of

Values = Sequence[float | None]
"""One for each seed; None where there is none."""


class Results:
    """Reads the results of steps that have been done.

    Args:
        outcomes: by the steps' names.
        seeds: those of the report.
    """

    def __init__(
        self, setting: Setting, outcomes: Mapping[str, Outcome], seeds: Sequence[int]
    ) -> None:
        self.setting, self.outcomes, self.seeds = setting, outcomes, seeds
        self._trainings: set[str] = set()

    def json(self, step: Step, file: str) -> Any:
        """The content of a step's file; None if it has not been done, or is one that diverged."""
        self._trainings.add(training_of(step.name))
        if step.name not in self.outcomes or self.diverged(step.name):
            return None
        path = self.setting.runs / step.name / file
        try:
            return _dict_in(path)
        except (OSError, RecursionError, ValueError) as e:
            raise _spoilt(path, f"cannot be read ({reason_of(e)})") from e

    def at(self, step: Step, file: str, *keys: str) -> Any:
        """What a step's file has under keys; None as of :meth:`json`."""
        value = self.json(step, file)
        for key in keys:
            if value is not None and not (isinstance(value, Mapping) and key in value):
                raise _spoilt(self.setting.runs / step.name / file, f"has no {'.'.join(keys)}")
            value = None if value is None else value[key]
        return value

    def ap(self, step: Step, file: str, *keys: str, metric: str = "AP") -> float | None:
        """AP in a step's file, by keys that end with "bbox" or "segm"; 0 without detections.

        Args:
            metric: which one, such as that of a category.
        """
        *where, task = keys
        metrics = self.at(step, file, *where)
        if metrics is None:
            return None
        path = self.setting.runs / step.name / file
        # Detectron2 has no masks where there are no detections.
        of_task = metrics.get(task, {}) if isinstance(metrics, Mapping) else None
        found = of_task.get(metric) or 0.0 if isinstance(of_task, Mapping) else None
        if not isinstance(found, int | float):
            raise _spoilt(path, f"has no AP under {'.'.join(keys)}")
        return 0.0 if math.isnan(found) else float(found)

    def metrics(self, training: Training) -> list[dict[str, float]]:
        """The lines of a training's metrics.json, also of one that has diverged, in their order."""
        self._trainings.add(training.name)
        if training.name not in self.outcomes:
            return []
        folder = self.setting.runs / training.name
        # One that diverges at once has written none.
        return read_metrics(folder) if (folder / "metrics.json").is_file() else []

    def ap_at(self, training: Training, task: str, iteration: int) -> float | None:
        """AP of an iteration of the published setting, as :meth:`ap`; a mean over test sets."""
        done = training.iteration(iteration)
        for line in self.metrics(training):
            # Counted from 0; but Detectron2's evaluation at the end has the number of iterations.
            if line["iteration"] not in (done - 1, done):
                continue
            # Each has boxes; but no masks where nothing is detected.
            of_boxes = [key for key in line if key.endswith("bbox/AP")]
            values = [line.get(key.replace("bbox", task), math.nan) for key in of_boxes]
            if values:
                return mean(0.0 if math.isnan(value) else value for value in values)
        return None

    def over_seeds(self, value: Callable[..., float | None], *args: Any) -> list[float | None]:
        """``value(results, seed, *args)`` for each seed."""
        return [value(self, seed, *args) for seed in self.seeds]

    def with_trainings(
        self, value: Callable[..., float | None], seed: int
    ) -> tuple[float | None, set[str]]:
        """``value(results, seed)``, and the names of the trainings whose results it reads."""
        self._trainings.clear()
        return value(self, seed), set(self._trainings)

    def diverged(self, name: str) -> bool:
        """Whether a training ended with a loss that was not finite."""
        outcome = self.outcomes.get(name)
        return outcome is not None and outcome.diverged_at is not None

    def leapt(self, name: str) -> bool:
        """Whether the loss of a training did, or was not finite at last."""
        return self.diverged(name) or bool(self.spikes(name)["spikes"])

    def of_seeds(self, number: int) -> Results:
        """The same of the first seeds alone."""
        return Results(self.setting, self.outcomes, self.seeds[:number])

    def spikes(self, name: str) -> dict[str, Any]:
        """What :class:`bn_det.training.LossSpikes` has noted of a training."""
        folder = self.setting.runs / name
        if name in self.outcomes and not self.diverged(name) and not (folder / FILE).is_file():
            raise _spoilt(folder / FILE, "is not there")  # and may have told of a spike
        try:
            return read_spikes(folder)
        except (OSError, ValueError) as e:
            raise _spoilt(folder / FILE, f"cannot be read ({reason_of(e)})") from e


def _spoilt(path: Path, why: str) -> InputError:
    """Of a file that a step has left, and that is not as it leaves one."""
    return InputError(f"--runs: {path} {why}; remove {path.parent}, and the step runs again")


def _dict_in(path: Path) -> Mapping[str, Any]:
    """What a JSON file has; ValueError where that is no object."""
    if not isinstance(found := read_json(path), Mapping):
        raise ValueError(f"it has a {type(found).__name__}")
    return found


def difference(a: float | None, b: float | None) -> float | None:
    """a - b, where both are known."""
    return None if a is None or b is None else a - b


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known."""
    return None if a is None or b is None else a / b


def known(values: Iterable[float | None]) -> list[float]:
    """All of them, where all are known; else none."""
    found = list(values)
    return [] if None in found else cast("list[float]", found)


def average(values: Iterable[float | None]) -> float | None:
    """Their mean, where all are known, and there are some."""
    found = known(values)
    return mean(found) if found else None


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        label: texts for the first columns.
        cells: for each other column its values by seed.
        steps: what it was made of, of the first seed, for the commands that are shown.
    """

    label: tuple[str, ...]
    cells: tuple[Values, ...]
    steps: tuple[Step, ...]


class Table(NamedTuple):
    """Rows of values.

    Attributes:
        name: short, for programs.
        title, note: for people.
        labels: headers of the rows' labels.
        columns: headers of the values.
        digits: after the point, for each column.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    rows: list[Row]
    note: str = ""


class Picture(NamedTuple):
    """A figure; it is saved as ``<name>.png``."""

    name: str
    caption: str
    figure: Figure


class Line(NamedTuple):
    """A curve: its values by seed at each x. Drawn are their mean, least and greatest.

    Attributes:
        group: curves of one have the same colour; by default the label.
        dashed: to tell it from another of its group.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[Values]
    group: str = ""
    dashed: bool = False


def by_layer(label: str, of_seeds: Sequence[Sequence[float]]) -> Line:
    """A curve over layers, of the values of all layers by seed; those that all known seeds have."""
    columns = list(zip(*filter(None, of_seeds), strict=False))
    return Line(label, range(len(columns)), columns)


class Panel(NamedTuple):
    """One set of axes.

    Attributes:
        log: the axes that are logarithmic: "x", "y" or "xy".
        groups: names for x = 0, 1, ..., between which there are no lines.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    log: str = ""
    groups: Sequence[str] = ()


def draw(panels: Sequence[Panel], shared_y: bool = False) -> Figure:
    """Panels beside each other; lines of the same group have the same colour."""
    groups = list(dict.fromkeys(line.group or line.label for p in panels for line in p.lines))
    figure = Figure(figsize=(1 + 3.8 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=shared_y)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for k, line in enumerate(panel.lines):
            index = groups.index(line.group or line.label)
            colour = matplotlib.colormaps["tab10"](index % 10)
            if panel.groups:
                _draw_points(axis, line, colour, shift=0.12 * (k - (len(panel.lines) - 1) / 2))
            else:
                _draw_line(axis, line, colour)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        _scale(axis, panel)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return figure


def _scale(axis: Axes, panel: Panel) -> None:
    if panel.groups:
        axis.set_xticks(range(len(panel.groups)), panel.groups)
        axis.set_xlim(-0.5, len(panel.groups) - 0.5)
    if "x" in panel.log:
        axis.set_xscale("log", base=2)
        xs = sorted({x for line in panel.lines for x in line.xs})
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
    if "y" in panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_PlainNumbers())
        axis.yaxis.set_minor_formatter(_PlainNumbers())


class _PlainNumbers(LogFormatter):
    """0.2 for 2 x 10^-1, at those ticks that matplotlib labels."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _points(line: Line) -> tuple[list[float], list[float], list[float], list[float]]:
    """Where there are values: x, and their mean, least and greatest."""
    found: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for x, values in zip(line.xs, line.ys, strict=True):
        known = [v for v in values if v is not None]
        if known:
            for column, value in zip(found, (x, mean(known), min(known), max(known)), strict=True):
                column.append(value)
    return found


def _draw_line(axis: Axes, line: Line, colour: Any) -> None:
    xs, means, low, high = _points(line)
    if xs:
        style = "o--" if line.dashed else "o-"
        axis.plot(xs, means, style, markersize=3, color=colour, label=line.label)
        axis.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)


def _draw_points(axis: Axes, line: Line, colour: Any, shift: float) -> None:
    xs, means, low, high = _points(line)
    if xs:
        xs = [x + shift for x in xs]
        axis.plot(xs, means, "o", markersize=6, color=colour, label=line.label)
        axis.vlines(xs, low, high, color=colour, alpha=0.6)
