"""Results of trainings and evaluations: tables for people, and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from tabulate import tabulate
from torch import nn
from yacs.config import CfgNode

from ..doctor.evaluation import Score
from ..errors import shown
from ..files import finite, is_json, parse_json, read_text, within_memory, write_json


def results_table(results: Mapping[str, Mapping]) -> str:
    """A table of metrics, one for each task.

    Args:
        results: metrics by task, ``{"bbox": {"AP": 21.3, ...}}``; or such a dict by data set where
            there are several.
    """
    parts = []
    is_whole = True
    for name, metrics in results.items():
        if any(isinstance(value, Mapping) for value in metrics.values()):
            parts += [f"Data set {name}", results_table(metrics)]
            continue
        overall = {k: v for k, v in metrics.items() if not k.startswith("AP-")}
        classes = {k[len("AP-") :]: v for k, v in metrics.items() if k.startswith("AP-")}
        parts.append(f"Evaluation results for {name}:\n{_row_table(overall)}")
        if classes:
            parts.append(f"Per-category {name} AP:\n{_row_table(classes)}")
        is_whole &= all(value == value for value in metrics.values())
    if not is_whole:
        parts.append("-: there is nothing to be found, or nothing was detected at all")
    return "\n".join(parts)


def save_results(results: Mapping[str, Mapping], folder: str | Path) -> None:
    """Write ``results.json`` into a folder, metrics by task; those that are not known as null."""
    write_json(Path(folder) / "results.json", finite(results))


@contextmanager
def outputs_aside(cfg: CfgNode) -> Iterator[CfgNode]:
    """The config with a folder for outputs that is removed after the block.

    So that what evaluates another model leaves a run's detections, which are of its own.
    """
    with TemporaryDirectory() as folder:
        aside = cfg.clone()
        aside.defrost()
        aside.OUTPUT_DIR = folder
        aside.freeze()
        yield aside


def score_of(cfg: CfgNode, test: Callable[[CfgNode, nn.Module], Mapping]) -> Score | None:
    """The AP of boxes on DATASETS.TEST, the mean where there are several; None where there is none.

    Args:
        test: gives results; what it writes to OUTPUT_DIR is not kept.
    """
    if not cfg.DATASETS.TEST:
        return None

    def score(model: nn.Module) -> float:
        with outputs_aside(cfg) as aside:
            try:
                results = test(aside, model)
            except FloatingPointError:  # boxes that are no numbers, of which none is right
                return 0.0
        of_sets = [results] if "bbox" in results else list(results.values())
        # Evaluators call it NaN where nothing is detected.
        return fmean(ap if (ap := of["bbox"]["AP"]) == ap else 0.0 for of in of_sets)

    return score


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json, one an iteration, in their order.

    Of an iteration that was repeated after an interruption, the last line counts. One that ends in
    the middle, as a full disk or a killed process leaves it, does not.
    """
    found: dict[int, dict[str, float]] = {}
    path = Path(folder) / "metrics.json"
    with within_memory(path):
        *whole, cut = read_text(path).split("\n")
        for text in whole + [cut] * is_json(cut):
            line = parse_json(text)
            found.setdefault(line["iteration"], {}).update(line)
    return [found[iteration] for iteration in sorted(found)]


def _row_table(metrics: Mapping[str, float]) -> str:
    return tabulate(
        [["-" if value != value else value for value in metrics.values()]],
        headers=[shown(name) for name in metrics],
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="center",
        stralign="center",
    )
