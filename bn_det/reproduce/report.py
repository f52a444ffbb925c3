"""The report of experiments: a page, pictures, and the numbers as JSON."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from tabulate import tabulate

from ..errors import InputError
from ..files import finite, write_aside, write_json, write_text
from ..training.spikes import FACTOR, spike_text
from .claims import Claim, Verdict, claims_of, judge
from .ledger_picture import ledger_picture
from .looks import Looks
from .power import MOST, seeds_needed
from .published import NUM_GPUS, what_changes
from .registry import experiments_on
from .results import Picture, Results, Table, Values
from .runner import Failure
from .steps import Setting, Step, shown

RESULTS = "results.json"


class Report(NamedTuple):
    """What is shown of some experiments.

    Attributes:
        title: what the user asked for.
        shows: tables and pictures by experiment.
        ledger: the claims that were tested, with their verdicts.
        picture: of the ledger; None where nothing is known.
        steps: all of them, in their order.
        failures: what went wrong.
        looks: when claims are looked at, this time among others.
        spikes: what is noted of the losses of each training, by its name.
    """

    title: str
    results: Results
    shows: dict[str, list[Table | Picture]]
    ledger: list[tuple[Claim, Verdict]]
    picture: Picture | None
    steps: Sequence[Step]
    failures: Sequence[Failure]
    looks: Looks
    spikes: dict[str, dict[str, Any]]


def make_report(
    title: str,
    names: Sequence[str],
    results: Results,
    steps: Sequence[Step],
    failures: Sequence[Failure],
    looks: Looks | None = None,
    decided: Mapping[str, Verdict] = MappingProxyType({}),
) -> Report:
    """Of the experiments that are named, as far as their steps have been done.

    Args:
        looks: one at the seeds of the results, by default.
        decided: verdicts of earlier looks, by claim, which stand.
    """
    looks = looks or Looks((len(results.seeds),), 0.95)
    experiments = experiments_on(results.setting.data)
    shows = {name: experiments[name].show(results) for name in names}
    ledger = [
        (claim, decided.get(claim.name) or verdict_of(claim, results, looks.confidence))
        for claim in claims_of(names, results.setting.data)
    ]
    spikes = {s.name: results.spikes(s.name) for s in steps if s.is_training}
    known = {name: noted for name, noted in spikes.items() if noted["largest"]}
    picture = ledger_picture(ledger, looks.confidence)
    return Report(title, results, shows, ledger, picture, steps, failures, looks, known)


def verdict_of(claim: Claim, results: Results, confidence: float = 0.95) -> Verdict:
    """By the seeds that count: those in which no training that the effect is of had a loss spike.

    Unless the claim is about how much a training bears.
    """
    effect = experiments_on(results.setting.data)[claim.experiment].EFFECTS[claim.name]
    effects, left_out = [], []
    for seed in results.seeds:
        value, trainings = results.with_trainings(effect, seed)
        if value is None:
            continue
        if not claim.with_spikes and any(results.spikes(name)["spikes"] for name in trainings):
            left_out.append(seed)
        else:
            effects.append(value)
    return judge(claim, effects, confidence)._replace(left_out=tuple(left_out))


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.html``, ``results.json``, ``claims.md`` and the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in _pictures(report):
        with write_aside(folder / f"{picture.name}.png") as aside:
            picture.figure.savefig(aside, format="png", dpi=120)
    write_text(folder / "claims.md", ledger_markdown(report) + "\n")
    write_text(folder / "report.html", _page(report, folder))
    write_json(folder / RESULTS, finite(_as_dict(report)))


def _pictures(report: Report) -> list[Picture]:
    shown = [item for show in report.shows.values() for item in show]
    return [item for item in (report.picture, *shown) if isinstance(item, Picture)]


def identity(title: str, setting: Setting, looks: Looks) -> dict[str, Any]:
    """What must be the same for a report to be written over another."""
    return {
        "experiment": title,
        "data": setting.data,
        "host": setting.host,
        "num_gpus": setting.num_gpus,
        "opts": list(setting.opts),
        "looks": list(looks.seeds) if looks.are_several else None,
    }


def cell(values: Values, digits: int) -> str:
    """Values by seed for people: a mean, and a standard deviation where there are several."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def table_text(table: Table) -> str:
    """For the terminal."""
    rows = [[*row.label, *_cells(table, row.cells)] for row in table.rows]
    headers = [*table.labels, *table.columns]
    body = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{table.title}\n{body}"


def ledger_markdown(report: Report) -> str:
    """The ledger as a table."""
    rows = [
        [
            *(claim.sentence, claim.name, wanted(claim), effect_text(verdict)),
            *(verdict.word or "-", _needed(claim, verdict, report.looks)),
        ]
        for claim, verdict in report.ledger
    ]
    headers = ["claim", "name", "what counts", _found(report.looks), "verdict", SEEDS_NEEDED]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def effect_text(verdict: Verdict) -> str:
    """The mean effect, its interval, the number of seeds, and those that are left out."""
    left_out = ", ".join(map(str, verdict.left_out))
    left_out = f"; loss spikes in seed {left_out}" if left_out else ""
    if not verdict.effects:
        return f"not measured{left_out}"
    digits = 3 if abs(verdict.mean) < 1 else 2
    text = f"{verdict.mean:+.{digits}f}"
    if verdict.low is None:
        return f"{text} (one seed{left_out})"
    ends = f"[{verdict.low:.{digits}f}, {verdict.high:.{digits}f}]"
    return f"{text} {ends} ({len(verdict.effects)}{left_out})"


def spikes_text(report: Report) -> list[str]:
    """Lines on the loss spikes of all trainings."""
    if not report.spikes:
        return []
    lines = [
        f"{name}: {spike_text(spike)}"
        for name, noted in report.spikes.items()
        for spike in noted["spikes"]
    ]
    name, most = max(
        ((name, noted["largest"]) for name, noted in report.spikes.items()),
        key=lambda of: of[1]["ratio"],
    )
    end = (
        f"the largest loss over its running median: {most['ratio']:.2f}, {name} at iteration "
        f"{most['iteration']}; {FACTOR:g} is a spike"
    )
    count = sum(bool(noted["spikes"]) for noted in report.spikes.values())
    return [f"Loss spikes in {count} of {len(report.spikes)} trainings; {end}", *lines]


def _found(looks: Looks) -> str:
    return f"found ({100 * looks.confidence:g} % interval, seeds)"


SEEDS_NEEDED = "seeds needed"


def _needed(claim: Claim, verdict: Verdict, looks: Looks) -> str:
    if len(verdict.effects) < 2:
        return "-"
    return str(seeds_needed(claim, verdict, looks.confidence) or f"more than {MOST}")


def wanted(claim: Claim) -> str:
    return f"{'at most' if claim.at_most else 'at least'} {claim.smallest:g} {claim.unit}"


def _cells(table: Table, cells: Sequence[Values]) -> list[str]:
    return [cell(v, digits) for v, digits in zip(cells, table.digits, strict=True)]


def _as_dict(report: Report) -> dict[str, Any]:
    outcomes = report.results.outcomes
    return {
        **identity(report.title, report.results.setting, report.looks),
        "confidence": report.looks.confidence,
        "seeds": list(report.results.seeds),
        "versions": _versions(),
        "claims": [
            {
                **claim._asdict(),
                **verdict._asdict(),
                "verdict": verdict.word,
                "seeds_needed": seeds_needed(claim, verdict, report.looks.confidence),
            }
            for claim, verdict in report.ledger
        ],
        "tables": {
            name: [_table_dict(t) for t in show if isinstance(t, Table)]
            for name, show in report.shows.items()
        },
        "steps": {
            step.name: {"command": shown(step.command), **outcomes[step.name]._asdict()}
            for step in report.steps
            if step.name in outcomes
        },
        "loss_spikes": report.spikes,
        "failed": {failure.step.name: failure.reason for failure in report.failures},
    }


def _table_dict(table: Table) -> dict[str, Any]:
    rows = [
        {
            **dict(zip(table.labels, row.label, strict=True)),
            **{name: list(v) for name, v in zip(table.columns, row.cells, strict=True)},
            "steps": [step.name for step in row.steps],
        }
        for row in table.rows
    ]
    return {"name": table.name, "title": table.title, "rows": rows}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("bn_det", "torch", "torchvision", "detectron2", "timm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top }
th { background: #f2f2f2 } td.number { text-align: right; white-space: nowrap }
td.seen { background: #dff0d8 } td.opposite { background: #f2dede } td.hint { color: #888 }
td.absent { background: #d9edf7 }
img { max-width: 100% } code, pre { font-size: 12px; white-space: pre-wrap } .note { color: #555 }
.warning { background: #fcf8e3; padding: .5em 1em }
"""


def _page(report: Report, folder: Path) -> str:
    setting, seeds = report.results.setting, list(report.results.seeds)
    seconds = sum(o.seconds for o in report.results.outcomes.values())
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>bn_det: {escape(report.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.title)}: what the batch in BatchNorm does</h1>",
        f"<p>Data: {setting.data}. Host: {setting.host}. Seeds: {seeds}. {escape(versions)}. "
        f"The steps together took {timedelta(seconds=round(seconds))}, some at the same time "
        "(of a training that was resumed, the last part counts).</p>",
        *_warnings(report),
        "<h2>The ledger of claims</h2>",
        "<p>The claims, their metrics and the smallest effects that count were fixed before the "
        "first run (docs/claims.md). One seed is a hint, and no verdict. A seed in which a "
        "training had a loss spike does not count, but for claims on how much a training bears. "
        "Seeds needed: with which the smallest effect that counts would be told from none in nine "
        "of ten repetitions, if effects spread as those of these seeds do.</p>",
        _ledger_html(report),
        *([_picture_html(report.picture, folder)] if report.picture else []),
        *_spikes_html(report),
    ]
    for name, show in report.shows.items():
        parts.append(f"<h2>{name}</h2><p>{_rich(_about(experiments_on(setting.data)[name]))}</p>")
        for item in show:
            if isinstance(item, Table):
                parts.append(_table_html(item))
            else:
                parts.append(_picture_html(item, folder))
    return "\n".join([*parts, "</body></html>"])


def _about(experiment: ModuleType) -> str:
    return (experiment.__doc__ or "").strip().splitlines()[0]


def _warnings(report: Report) -> list[str]:
    found, setting = [], report.results.setting
    if setting.opts:
        opts = escape(" ".join(setting.opts))
        found.append(
            f"All commands had the options <code>{opts}</code>: these are not the settings that "
            "the claims were written down for."
        )
    if setting.data == "coco" and setting.num_gpus != NUM_GPUS:
        found.append(escape(f"{setting.num_gpus} GPUs: {what_changes(setting.num_gpus)}."))
    missing = len([s for s in report.steps if s.name not in report.results.outcomes])
    if missing:
        found.append(f"{missing} of {len(report.steps)} steps are missing.")
    found += [
        f"Failed: <code>{escape(f.step.name)}</code>: {escape(f.reason)}" for f in report.failures
    ]
    return [f"<p class='warning'>{text}</p>" for text in found]


def _spikes_html(report: Report) -> list[str]:
    lines = spikes_text(report)
    style = "warning" if len(lines) > 1 else "note"
    return [f"<p class='{style}'>{escape(line)}</p>" for line in lines]


def _ledger_html(report: Report) -> str:
    rows = []
    for claim, verdict in report.ledger:
        word = verdict.word or "-"
        rows.append(
            f"<tr><td>{_rich(claim.sentence)}<br><span class='note'>{_rich(claim.source)}</span>"
            f"</td><td>{_rich(claim.metric)}</td><td>{escape(wanted(claim))}</td>"
            f"<td class='number'>{escape(effect_text(verdict))}</td>"
            f"<td class='{word.replace(' ', '-')}'>{word}</td>"
            f"<td class='number'>{_needed(claim, verdict, report.looks)}</td></tr>"
        )
    headers = ("claim", "metric", "what counts", _found(report.looks), "verdict", SEEDS_NEEDED)
    return _html(headers, rows)


def _table_html(table: Table) -> str:
    rows = []
    for row in table.rows:
        labels = "".join(f"<td>{escape(text)}</td>" for text in row.label)
        cells = "".join(f"<td class='number'>{c}</td>" for c in _cells(table, row.cells))
        commands = "\n".join(dict.fromkeys(shown(step.command) for step in row.steps))
        details = f"<details><summary>commands</summary><pre>{escape(commands)}</pre></details>"
        rows.append(f"<tr>{labels}{cells}<td>{_config(row.steps)}{details}</td></tr>")
    note = f"<p class='note'>{_rich(table.note)}</p>" if table.note else ""
    headers = (*table.labels, *table.columns, "config, and commands of the first seed")
    return f"<h3>{escape(table.title)}</h3>{_html(headers, rows)}{note}"


def _config(steps: Sequence[Step]) -> str:
    command = steps[0].command
    return f"<code>{escape(command[command.index('--config-file') + 1])}</code>"


def _html(headers: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _picture_html(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'>"
        f"<figcaption class='note'>{caption}</figcaption></figure>"
    )


def _rich(text: str) -> str:
    """HTML of a text with *emphasis* and `code`."""
    text = re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def known_identity(folder: Path) -> Mapping[str, Any] | None:
    """That of the report in a folder, and its seeds; None where there is none.

    Raises:
        InputError: there is a file of that name which is none of a report.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"experiment", "seeds"} <= found.keys():
        raise InputError(f"--output: {path} is not of a report; use another folder")
    return found
