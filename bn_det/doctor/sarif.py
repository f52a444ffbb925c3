"""The doctor's report as SARIF 2.1.0, which code scanning of a forge reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files import finite
from .findings import Finding, Report
from .rules import RULES

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def sarif_log(report: Report, path: str | os.PathLike, version: str) -> dict[str, Any]:
    """For JSON; each finding is a result, and each layer of it a location.

    Args:
        path: of the checkpoint; a relative one is found from the root of a repository.
        version: of bn_det.

    Source: OASIS, Static Analysis Results Interchange Format 2.1.0, errata 01.
    """
    # Severities have the names of SARIF's levels; the first finding of a rule is its most severe.
    levels = {of.rule: of.severity for of in reversed(report.findings)}
    found = [rule for rule in RULES if rule in levels]
    driver = {
        "name": "bn_det doctor",
        "version": version,
        "rules": [_rule(rule, levels[rule]) for rule in found],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(of, found.index(of.rule), _uri(path)) for of in report.findings],
        "properties": {"verdict": report.verdict, "tried": report.as_dict()["tried"]},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(name: str, level: str) -> dict[str, Any]:
    rule = RULES[name]
    return {
        "id": name,
        "shortDescription": {"text": rule.name},
        "fullDescription": {"text": rule.finds},
        "help": {"text": rule.explain(name), "markdown": _markdown(rule.parts)},
        "defaultConfiguration": {"level": level},
    }


def _markdown(parts: dict[str, str]) -> str:
    return "\n\n".join(f"**{head}**\n\n{text}" for head, text in parts.items())


def _result(of: Finding, index: int, uri: str) -> dict[str, Any]:
    more: dict[str, float | str | None] = {
        "value": of.value,
        "standardError": of.standard_error,
        "gain": of.gain,
    }
    more |= {"gainMeasure": of.measure or None, "untried": of.untried or None}
    return {
        "ruleId": of.rule,
        "ruleIndex": index,
        "level": of.severity,
        "message": {"text": f"{of.why}. Mend: {of.prescription}"},
        "locations": list(_locations(of, uri)),
        "properties": {key: v for key, v in finite(more).items() if v is not None},
    }


def _locations(of: Finding, uri: str) -> Iterator[dict[str, Any]]:
    """One a layer, as all are to be mended; or the file alone."""
    # A checkpoint has no lines, and code scanning shows nothing that is on none.
    file = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    for name in of.where:
        yield {"physicalLocation": file, "logicalLocations": [{"fullyQualifiedName": name}]}
    if not of.where:
        yield {"physicalLocation": file}


def _uri(path: str | os.PathLike) -> str:
    """As RFC 3986 has it; addresses of a host's own, such as detectron2://, are one already."""
    text = os.fspath(path)
    if "://" in text:
        return text
    return Path(text).as_uri() if os.path.isabs(text) else quote(os.fsencode(text))
