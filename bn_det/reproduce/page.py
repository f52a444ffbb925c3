"""A report as a self-contained page of HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from types import ModuleType

from .registry import experiments_on
from .report import Report
from .results import Picture, Table
from .steps import Step, shown
from .words import (
    SEEDS_NEEDED,
    cells_text,
    effect_text,
    found_text,
    needed_text,
    spikes_text,
    wanted,
    warnings_of,
    word_text,
)

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


def report_page(report: Report, folder: Path, versions: Mapping[str, str]) -> str:
    """Of a report whose pictures are in a folder."""
    setting, seeds = report.results.setting, list(report.results.seeds)
    seconds = sum(o.seconds for o in report.results.outcomes.values())
    ran_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    ran_with = ran_with or "What it ran with was not noted"
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>bn_det: {escape(report.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.title)}: what the batch in BatchNorm does</h1>",
        f"<p>Data: {setting.data}. Host: {setting.host}. Seeds: {seeds}. {escape(ran_with)}. "
        f"The steps' times add up to {timedelta(seconds=round(seconds))} (several may have run at "
        "the same time; of a training that was resumed, the last part counts).</p>",
        *_warnings(report),
        "<h2>The ledger of claims</h2>",
        "<p>The claims, their metrics and the smallest effects that count were fixed before the "
        "first run (docs/claims.md). <em>Seen</em>: the mean is an effect that counts, and its "
        "interval is above zero. <em>Opposite</em>: the same of its negative. <em>Absent</em>: the "
        "whole interval is of effects too small to count. <em>Not seen</em>: these seeds do not "
        "tell, which is not that there is no effect. A claim of <em>at most</em> is seen where all "
        "of the interval is at most that, and opposite where all of it is above. One seed is a "
        "<em>hint</em>, and no verdict. A seed in which a "
        "training had a loss spike, or diverged, does not count, but for claims on how much a "
        "training bears. "
        "Seeds needed: with which the smallest effect that counts would be told from none in nine "
        "of ten repetitions, if effects spread as those of these seeds do.</p>",
        _ledger_html(report),
        *([_picture_html(report.picture, folder)] if report.picture else []),
        *_spikes_html(report),
        "<p class='note'>In tables a mean and a standard deviation over the seeds, in the pictures "
        "of an experiment a mean, and a band or bar from the least to the greatest.</p>",
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
    return [f"<p class='warning'>{_rich(text)}</p>" for text in warnings_of(report)]


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
            f"<td class='{word.replace(' ', '-')}'>{word_text(claim, verdict)}</td>"
            f"<td class='number'>{needed_text(claim, verdict, report.looks)}</td></tr>"
        )
    headers = ("claim", "metric", "what counts", found_text(report.looks), "verdict", SEEDS_NEEDED)
    return _html(headers, rows)


def _table_html(table: Table) -> str:
    rows = []
    for row in table.rows:
        labels = "".join(f"<td>{escape(text)}</td>" for text in row.label)
        cells = "".join(f"<td class='number'>{c}</td>" for c in cells_text(table, row.cells))
        commands = "\n".join(dict.fromkeys(shown(step.command) for step in row.steps))
        details = f"<details><summary>commands</summary><pre>{escape(commands)}</pre></details>"
        rows.append(f"<tr>{labels}{cells}<td>{_config(row.steps)}{details}</td></tr>")
    note = f"<p class='note'>{_rich(table.note)}</p>" if table.note else ""
    headers = (*table.labels, *table.columns, "config, and commands of the first seed")
    return f"<h3>{escape(table.title)}</h3>{_html(headers, rows)}{note}"


def _config(steps: Sequence[Step]) -> str:
    return f"<code>{escape(steps[0].config)}</code>"


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
