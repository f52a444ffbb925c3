"""Results of an evaluation for people to read."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate


def results_table(results: Mapping[str, Mapping]) -> str:
    """A table of metrics, one for each task.

    Args:
        results: metrics by task, ``{"bbox": {"AP": 21.3, ...}}``; or such a dict by data set where
            there are several.
    """
    parts = []
    for name, metrics in results.items():
        if any(isinstance(value, Mapping) for value in metrics.values()):
            parts += [f"Data set {name}", results_table(metrics)]
            continue
        overall = {k: v for k, v in metrics.items() if not k.startswith("AP-")}
        classes = {k[len("AP-") :]: v for k, v in metrics.items() if k.startswith("AP-")}
        parts.append(f"Evaluation results for {name}:\n{_row_table(overall)}")
        if classes:
            parts.append(f"Per-category {name} AP:\n{_row_table(classes)}")
    return "\n".join(parts)


def _row_table(metrics: Mapping[str, float]) -> str:
    return tabulate(
        [list(metrics.values())],
        headers=list(metrics),
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="center",
        stralign="center",
    )
