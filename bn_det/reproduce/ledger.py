"""The ledger as data: what reports have found of the claims, and the table that is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..errors import InputError, reason_of
from .claims import CLAIMS, Claim
from .verdicts import Verdict
from .words import effect_text, wanted

BEGIN, END = "<!-- made of claims.json -->", "<!-- until here -->"
"""Between these lines of a page the table is."""

_KEYS = ("claim", "data", "host")
"""By which an entry is known."""

Entry = Mapping[str, Any]
"""One claim's: _KEYS, seeds, effects, mean, interval and its confidence, verdict, versions."""


def entries_of(path: Path) -> list[Entry]:
    """What a report's results.json says of its claims.

    Raises:
        InputError: it is no such file, or one of other settings than those of the claims.
    """
    try:
        report = json.loads(path.read_bytes())
        opts = report["opts"]
        found = [_entry(report, of) for of in report["claims"] if of["verdict"]]
    except (KeyError, OSError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: cannot be read as results.json of bn-det reproduce: {reason_of(e)}"
        ) from e
    if opts:
        raise InputError(
            f"{path}: is of a report with the options {' '.join(opts)}, which are not the settings "
            "that the claims were written down for"
        )
    return found


def _entry(report: Mapping[str, Any], of: Mapping[str, Any]) -> Entry:
    counted = [seed for seed in report["seeds"] if seed not in of["left_out"]]
    seeds = counted[: len(of["effects"])]  # a verdict stands that fewer of them have had
    kept = ("effects", "mean", "low", "high", "left_out", "verdict")
    return {
        **{"claim": of["name"], "data": report["data"], "host": report["host"]},
        **{"seeds": seeds, "confidence": report["confidence"], "versions": report["versions"]},
        **{key: of[key] for key in kept},
    }


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """All entries, in the order of the claims; a new one in place of an old one of its claim."""
    found = {tuple(of[key] for key in _KEYS): of for of in (*old, *new)}
    order = [claim.name for claim in CLAIMS]
    return sorted(found.values(), key=lambda of: (order.index(of["claim"]), of["data"], of["host"]))


def ledger_table(entries: Iterable[Entry]) -> str:
    """A row for each entry, in Markdown."""
    claims = {claim.name: claim for claim in CLAIMS}
    rows = [_row(claims[of["claim"]], of) for of in entries]
    headers = ["claim", "what counts", "data, host", "found [interval] (seeds)", "verdict"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _row(claim: Claim, of: Entry) -> list[str]:
    interval = of["mean"], of["low"], of["high"]
    verdict = Verdict(tuple(of["effects"]), *interval, of["verdict"], tuple(of["left_out"]))
    where = f"{of['data']}, {of['host']}"
    return [claim.name, wanted(claim), where, effect_text(verdict), of["verdict"]]


def with_table(page: str, table: str) -> str:
    """A page with another table between BEGIN and END.

    Raises:
        ValueError: it does not have both of these lines.
    """
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{table}\n\n{end}{after}"
