"""What the doctor reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..errors import InputError, nearest
from ..files import finite
from .rules import RULES

SEVERITIES = ("error", "warning", "note")
"""An error costs AP, a warning may, a note does not."""


class Finding(NamedTuple):
    """Of one rule, in some layers.

    Attributes:
        rule: its id.
        severity: one of SEVERITIES.
        where: names of layers; empty for the whole file.
        value: how much, in the unit that the rule names.
        standard_error: of the value, where it is an estimate.
        why: what has been seen, and what comes of it.
        treatment: the command or the line of code that mends it.
        gain: AP that the treatment has brought, where it was tried.
    """

    rule: str
    severity: str
    where: tuple[str, ...]
    value: float | None
    why: str
    treatment: str
    standard_error: float | None = None
    gain: float | None = None

    @property
    def place(self) -> str:
        """Where, in few words."""
        if not self.where:
            return "the file"
        if len(self.where) == 1:
            return self.where[0] or "the module"
        return f"{self.where[0]} and {len(self.where) - 1} more"


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" + "s" * (number != 1)


class Report(NamedTuple):
    """Prints as a verdict in one line, and a table of findings.

    Attributes:
        verdict: what is wrong, where, and what mends it.
        findings: the most severe first.
    """

    verdict: str
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.verdict,
            "findings": [finite({**of._asdict(), "where": list(of.where)}) for of in self.findings],
        }

    def __str__(self) -> str:
        from tabulate import tabulate  # not before it is read: the layers need torch alone

        if not self.findings:
            return self.verdict
        table = tabulate(
            [
                [of.severity, of.rule, RULES[of.rule].name, of.place, _number(of)]
                for of in self.findings
            ],
            ["", "rule", "", "where", "how much"],
            tablefmt="pipe",
            disable_numparse=True,
        )
        details = [f"{of.rule}: {of.why}\n  mend: {of.treatment}" for of in self.findings]
        return "\n".join([self.verdict, "", table, "", *details])


def _number(of: Finding) -> str:
    if of.value is None:
        return ""
    error = "" if of.standard_error is None else f" ± {of.standard_error:.1g}"
    return f"{of.value:.3g}{error} {RULES[of.rule].unit}"


def make_report(findings: Sequence[Finding], healthy: str) -> Report:
    """Findings in order, and the verdict of the first.

    Args:
        healthy: the verdict where there are none but notes.
    """
    ordered = sorted(findings, key=lambda of: (SEVERITIES.index(of.severity), of.rule))
    if not ordered or ordered[0].severity == "note":
        return Report(healthy, ordered)
    first = ordered[0]
    verdict = f"{RULES[first.rule].says}, in {first.place} ({first.rule}); {first.treatment}"
    return Report(verdict, ordered)


def selected(rules: Collection[str], select: Collection[str], ignore: Collection[str]) -> set[str]:
    """The ids that are selected, all by default, and not ignored; each may be the start of some.

    Raises:
        InputError: one is the start of none.
    """
    for flag, names in (("--select", select), ("--ignore", ignore)):
        for name in names:
            if not any(rule.startswith(name) for rule in rules):
                raise InputError(f"{flag}: there is no rule {name!r}; {nearest(name, rules)}")
    wanted = {r for r in rules if not select or r.startswith(tuple(select))}
    return wanted - {r for r in rules if ignore and r.startswith(tuple(ignore))}
