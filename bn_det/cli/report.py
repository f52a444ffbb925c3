"""One page of a run: its curves, its AP by data set, what BatchNorm did, and detections.

It is made of what a training or an evaluation of either host has left in OUTPUT_DIR, of data sets
in COCO's format; no model is made. What is not there is said. The page needs no other file.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from matplotlib.figure import Figure
from yacs.config import CfgNode

from ..commands.results import read_metrics
from ..config.ranges import check_value
from ..config.rules import between
from ..config.yaml_text import parse
from ..data.coco import builtin_sources, load_coco, registered_sources
from ..errors import InputError, one_line
from ..files import check_writable, read_json, read_text, write_text
from ..training.spikes import read_spikes, spike_text
from .plot import LARGEST
from .visualize import check_detections, load_detections, picture_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

_EVALUATED = re.compile(rf"(?:(?P<set>.+)/)?(?P<task>bbox|segm)/(?P<metric>{'|'.join(METRICS)})")

_NO_EVALUATION = "No evaluation is in metrics.json or results.json"

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem; font: 16px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem .3rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } td { border-top: 1px solid #8886; }
img { max-width: 100%; } figure { margin: 0; } .plot { background: #fff; }
.warning { border-left: .4rem solid #d0342c; padding-left: .8rem; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
"""


class Run(NamedTuple):
    """What a folder has of a run.

    Attributes:
        metrics: the lines of metrics.json, one an iteration; none of an evaluation alone.
        config: as config.yaml has it; empty where there is none.
        results: as results.json has them, by data set ("" where there is one) and task.
        spikes: as in loss_spikes.json.
    """

    folder: Path
    metrics: list[dict[str, float]]
    config: Mapping[str, Any]
    results: Mapping[tuple[str, str], Mapping[str, float]]
    spikes: Mapping[str, Any]


def read_run(folder: Path) -> Run:
    """Raises InputError for a folder of no run, or with a file that is not as it is written."""
    if not folder.is_dir():
        raise InputError(f"OUTPUT_DIR: there is no folder {folder}")
    files = {name: folder / name for name in ("metrics.json", "config.yaml")}
    if not any(path.is_file() for path in files.values()):
        raise InputError(
            f"OUTPUT_DIR: {folder} is of no run: it has no metrics.json and no config.yaml"
        )
    try:
        path = files["metrics.json"]
        metrics = read_metrics(folder) if path.is_file() else []
        for line in metrics:
            if not all(type(value) in (int, float) for value in line.values()):
                raise ValueError(f"a value of iteration {line['iteration']!r} is no number")
            if type(line["iteration"]) is not int:
                raise ValueError(f"iteration {line['iteration']!r} is no whole number")
        path = files["config.yaml"]
        config = parse(str(path), read_text(path)) if path.is_file() else {}
        path = folder / "results.json"
        results = _numbers_of(read_json(path)) if path.is_file() else {}
        path = folder / "loss_spikes.json"
        return Run(folder, metrics, config, results, read_spikes(folder))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: is not that of a run: {one_line(e)}") from e


def _numbers_of(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """results.json as :func:`evaluations`; what is not known there is null."""
    of_sets = {"": results} if results.keys() <= {"bbox", "segm"} else results
    return {
        (name, task): {k: math.nan if v is None else float(v) for k, v in values.items()}
        for name, tasks in of_sets.items()
        for task, values in tasks.items()
    }


def evaluations(run: Run) -> Mapping[tuple[str, str], Mapping[str, float]]:
    """The last metrics of each data set ("" where there is one) and task.

    Of a folder in which nothing but an evaluation was, those that are its results.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for line in run.metrics:
        for name, value in line.items():
            if match := _EVALUATED.fullmatch(name):
                key = match["set"] or "", match["task"]
                found.setdefault(key, {})[match["metric"]] = value
    return found or run.results


def curves(metrics: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, list[str]]]:
    """Titles of plots, and the metrics in each; none where there is a single value."""
    names = sorted({name for line in metrics for name in line})
    for title, pattern in (
        ("Losses", r"total_loss|loss_\w+"),
        ("Learning rate", "lr"),
        ("AP", r"(.+/)?(bbox|segm)/AP"),
        ("BatchNorm: staleness and noise of its statistics", r"bn_monitor/\w+"),
    ):
        shown = [name for name in names if re.fullmatch(pattern, name)]
        if any(sum(name in line for line in metrics) > 1 for name in shown):
            yield title, shown


def plot(run: Run, title: str, names: Sequence[str]) -> str:
    """A figure, as HTML; a loss spike is a line across."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name in names:
        points = [
            (line["iteration"] + 1, line[name])
            for line in run.metrics
            if name in line and abs(line[name]) < LARGEST
        ]
        label = name.removeprefix("bn_monitor/").replace("$", r"\$")
        axis.plot(*zip(*points, strict=True) if points else ([], []), label=label, marker=".")
    if title == "Losses":
        for spike in run.spikes["spikes"]:
            axis.axvline(spike["iteration"] + 1, color="red", linewidth=0.8)
    axis.set(title=title, xlabel="iterations")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=120)
        return _image(file.getvalue(), "png", title, "plot")


def _image(content: bytes, kind: str, caption: str, style: str = "") -> str:
    data = base64.b64encode(content).decode()
    return (
        f"<figure><img class='{style}' alt='{escape(caption)}' "
        f"src='data:image/{kind};base64,{data}'></figure>"
    )


def results_table(found: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    rows = []
    for (name, task), values in found.items():
        what = f"{name} {'boxes' if task == 'bbox' else 'masks'}".strip()
        numbers = (values.get(metric, math.nan) for metric in METRICS)
        cells = "".join(f"<td>{'-' if v != v else f'{v:.1f}'}</td>" for v in numbers)
        rows.append(f"<tr><td>{escape(what)}</td>{cells}</tr>")
    head = "".join(f"<th>{metric}</th>" for metric in ("", *METRICS))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def tested_sets(run: Run) -> list[str]:
    """DATASETS.TEST, empty where config.yaml has none."""
    datasets = run.config.get("DATASETS")
    names = datasets.get("TEST") if isinstance(datasets, Mapping) else None
    return [*map(str, names)] if isinstance(names, (list, tuple)) else []


def detections(run: Run, num_images: int, threshold: float) -> Iterator[tuple[str, str]]:
    """Of each data set of DATASETS.TEST its name, and HTML of detections beside the truth."""
    tested = tested_sets(run)
    if not tested:
        yield "Detections", _said("config.yaml names no data sets (DATASETS.TEST)")
        return
    for name in tested:
        folder = run.folder / "inference"
        paths = [of / "coco_instances_results.json" for of in (folder / name, folder)]
        path = next((of for of in paths if of.is_file()), None)
        title = f"Detections on {name}, truth above"
        if path is None:
            yield title, _said(f"there is no {paths[-1]}: it has not been evaluated to its end")
            continue
        try:
            yield title, _drawn(run.config, name, path, num_images, threshold)
        except (InputError, OSError, TypeError) as e:
            yield title, _said(one_line(e))


def _drawn(
    config: Mapping[str, Any], name: str, path: Path, num_images: int, threshold: float
) -> str:
    cfg = CfgNode({"DATASETS": {"REGISTER_COCO": config["DATASETS"].get("REGISTER_COCO", [])}})
    sources = builtin_sources() | registered_sources(cfg)
    if name not in sources:
        raise InputError(f"{name} is registered in code, and is not known here")
    if not Path(sources[name].json_file).is_file():  # shapes would be drawn
        raise InputError(f"there is no file {sources[name].json_file}")
    dataset = load_coco(name, sources[name])
    found = load_detections(str(path))
    check_detections(str(path), found, dataset)
    picture = picture_of(dataset, dataset.records[:num_images], found, threshold, 256)
    _, encoded = cv2.imencode(".png", picture)
    return _image(encoded.tobytes(), "png", f"Detections on {name}")


def _said(text: str) -> str:
    return f"<p>{escape(text)}.</p>"


def headline(run: Run, found: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """Of the first data set, in words."""
    done = round(max((line["iteration"] for line in run.metrics), default=-1)) + 1
    solver = run.config.get("SOLVER")
    planned = solver.get("MAX_ITER") if isinstance(solver, Mapping) else None
    if isinstance(planned, int):  # Detectron2's last evaluation is an iteration after the last one
        so_far = f"{min(done, planned)} of {planned} iterations"
    else:
        so_far = f"{done} iterations"
    for (name, task), values in found.items():
        if task == "bbox" and not math.isnan(values.get("AP", math.nan)):
            name = name or ", ".join(tested_sets(run))
            return f"AP {values['AP']:.1f}{f' on {name}' if name else ''} after {so_far}"
    return f"no AP after {so_far}"


def page_of(
    run: Run,
    line: str,
    found: Mapping[tuple[str, str], Mapping[str, float]],
    num_images: int,
    threshold: float,
) -> str:
    """The whole page, with its headline and the metrics that it is of."""
    spikes = [f"<p class='warning'>{escape(spike_text(of))}</p>" for of in run.spikes["spikes"]]
    tables = [results_table(found)] if found else [_said(_NO_EVALUATION)]
    plots = [plot(run, *of) for of in curves(run.metrics)]
    drawn = [
        f"<h2>{escape(title)}</h2>{html}" for title, html in detections(run, num_images, threshold)
    ]
    title = f"{run.folder.name}: {line}"
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(line)}</h1><p>{escape(str(run.folder.resolve()))}</p>",
        *spikes,
        *tables,
        f"<h2>Over the training</h2><div class='plots'>{''.join(plots)}</div>" if plots else "",
        *drawn,
        "</body></html>",
    ]
    return "\n".join(parts)


def main(prog: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="the page; by default report.html in OUTPUT_DIR"
    )
    parser.add_argument("--num-images", type=int, default=6, help="images of each data set")
    parser.add_argument("--conf-threshold", type=float, default=0.4, help="least score to draw")
    args = parser.parse_args(arguments)
    check_value("--num-images", args.num_images, between(1, 64))
    check_value("--conf-threshold", args.conf_threshold, between(0, 1))
    run = read_run(Path(args.folder))
    output = Path(args.output) if args.output is not None else run.folder / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output: {str(output)!r} is not accepted; use a file in .html")
    check_writable("--output", output.parent)
    found = evaluations(run)
    line = headline(run, found)
    write_text(output, page_of(run, line, found, args.num_images, args.conf_threshold))
    print(f"{output}: {line}")
