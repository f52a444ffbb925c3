"""The files of a report: a page, pictures, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import finite, write_aside, write_json, write_text
from .page import report_page
from .power import seeds_needed
from .report import RESULTS, Report, identity
from .results import Picture, Table
from .steps import shown
from .words import ledger_markdown, spikes_text, title_text, warnings_of


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.html``, ``results.json``, ``claims.md`` and the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = _versions(report)
    for picture in _pictures(report):
        with write_aside(folder / f"{picture.name}.png") as aside:
            picture.figure.savefig(aside, format="png", dpi=120)
    parts = [f"# {title_text(report)}", *warnings_of(report), ledger_markdown(report)]
    write_text(folder / "claims.md", "\n\n".join([*parts, *spikes_text(report)]) + "\n")
    write_text(folder / "report.html", report_page(report, folder, versions))
    write_json(folder / RESULTS, finite(_as_dict(report, versions)))


def _pictures(report: Report) -> list[Picture]:
    items = [item for show in report.shows.values() for item in show]
    return [item for item in (report.picture, *items) if isinstance(item, Picture)]


def _as_dict(report: Report, versions: Mapping[str, str]) -> dict[str, Any]:
    outcomes = report.results.outcomes
    return {
        **identity(report.title, report.results.setting, report.looks),
        "confidence": report.looks.confidence,
        "seeds": list(report.results.seeds),
        "versions": versions,
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


def _versions(report: Report) -> dict[str, str]:
    """Of the packages that its steps ran with; several of one, where they differ."""
    found: dict[str, set[str]] = {}
    for step in report.steps:
        outcome = report.results.outcomes.get(step.name)
        for name, version in ((outcome and outcome.versions) or {}).items():
            found.setdefault(name, set()).update(version.split(", "))
    return {name: ", ".join(sorted(of)) for name, of in found.items()}
