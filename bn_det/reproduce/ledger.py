"""The ledger as data: what reports have found of the claims, and the table that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..errors import InputError, reason_of
from ..files import read_json
from .claims import CLAIMS, Claim
from .published import NUM_GPUS
from .verdicts import Verdict, judge
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
        report = read_json(path)
        opts, data = list(report["opts"]), report["data"]
        failed = len(report.get("failed", {}))
        found = [_entry(report, of) for of in report["claims"] if of["verdict"]]
        for entry in found:
            _check(entry)
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: cannot be read as results.json of bn-det reproduce: {reason_of(e)}"
        ) from e
    if failed:
        raise InputError(
            f"{path}: is of a report of which {failed} steps have failed; give its command again"
        )
    if data == "coco" and report.get("num_gpus") != NUM_GPUS:
        opts.append(f"--num-gpus {report.get('num_gpus')}")
    if opts:
        raise InputError(
            f"{path}: is of a report with the options {' '.join(opts)}, which are not the settings "
            "that the claims were written down for"
        )
    return found


def _entry(report: Mapping[str, Any], of: Mapping[str, Any]) -> Entry:
    kept = ("seeds", "effects", "mean", "low", "high", "left_out", "verdict")
    # Of reports before it was noted it is nothing.
    unknown = {"unknown": of["unknown"]} if of.get("unknown") else {}
    return {
        **{"claim": of["name"], "data": report["data"], "host": report["host"]},
        **{"confidence": report["confidence"], "versions": report["versions"]},
        **{key: of[key] for key in kept},
        **unknown,
    }


def _check(entry: Entry) -> None:
    """Raise ValueError for what judging its effects again does not give."""
    claim = next((claim for claim in CLAIMS if claim.name == entry["claim"]), None)
    if claim is None or entry["data"] not in claim.data:
        raise ValueError(f"there is no claim {entry['claim']!r} on data {entry['data']!r}")
    if len(entry["seeds"]) != len(entry["effects"]):
        raise ValueError(f"{claim.name} has not an effect for each seed")
    word = judge(claim, entry["effects"], entry["confidence"]).word
    if word != entry["verdict"]:
        raise ValueError(f"{claim.name} is {entry['verdict']!r} there, and its effects {word!r}")


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """All entries, in the order of the claims; a new one in place of an old one of its claim.

    Raises:
        InputError: a new one has fewer seeds, and would say less.
    """
    found = {_key(of): of for of in old}
    for of in new:
        before = found.get(_key(of), of)
        if len(of["seeds"]) < len(before["seeds"]):
            raise InputError(
                f"{' '.join(_key(of))}: {len(of['seeds'])} seeds are not accepted in place of the "
                f"{len(before['seeds'])} that are there; use a report with as many"
            )
        found[_key(of)] = of
    order = [claim.name for claim in CLAIMS]
    return sorted(found.values(), key=lambda of: (order.index(of["claim"]), of["data"], of["host"]))


def _key(of: Entry) -> tuple[str, ...]:
    return tuple(of[key] for key in _KEYS)


def ledger_table(entries: Iterable[Entry]) -> str:
    """A row for each entry, in Markdown."""
    claims = {claim.name: claim for claim in CLAIMS}
    rows = [_row(claims[of["claim"]], of) for of in entries]
    headers = ["claim", "what counts", "data, host", "found [interval] (seeds)", "verdict"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _row(claim: Claim, of: Entry) -> list[str]:
    interval = of["mean"], of["low"], of["high"]
    seeds = tuple(of["seeds"]), tuple(of["left_out"]), tuple(of.get("unknown", ()))
    verdict = Verdict(tuple(of["effects"]), *interval, of["verdict"], *seeds)
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
