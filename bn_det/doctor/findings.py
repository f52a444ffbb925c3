"""What the doctor reports."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError, choose, first_of, nearest
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
        gain: what the treatment has brought, where it was tried: AP, or by how much the loss fell.
        measure: of the gain: "AP" or "loss".
        untried: why the treatment may harm, or why it could not be tried, where it was not.
    """

    rule: str
    severity: str
    where: tuple[str, ...]
    value: float | None
    why: str
    treatment: str
    standard_error: float | None = None
    gain: float | None = None
    measure: str = ""
    untried: str = ""

    @property
    def prescription(self) -> str:
        """The treatment, with a word if it was not tried, or does not help."""
        if self.untried:
            return f"untried: {self.treatment}"
        if self.gain is not None and self.gain <= 0:
            return f"tried, and no help here: {self.treatment}"
        return self.treatment

    @property
    def place(self) -> str:
        """Where, in few words."""
        if not self.where:
            return "the file" if self.rule.startswith("BN1") else "the model"
        return first_of(self.where) or "the module"


class Recompute(NamedTuple):
    """How statistics are recomputed, in the words of treatments.

    Attributes:
        usual: a command or a line of code.
        initial: the same where they are those of a new layer, which look folded.
        per_level: the same where levels are to have statistics of their own.
        needs: what a checkpoint with these needs beside it.
        adapt: the same on the target's images (AdaBN).
        frozen: the same of frozen layers, too.
        as_tested: the same in passes as at test time.
    """

    usual: str
    initial: str
    per_level: str
    needs: str
    adapt: str
    frozen: str
    as_tested: str

    @classmethod
    def by_command(
        cls,
        weights: str | os.PathLike,
        model: str,
        adapt: str = "",
        keys: Sequence[str] = (),
        as_tested: str = "",
    ) -> Recompute:
        """By bn-det recompute.

        Args:
            model: the flags that say what the model and its images are.
            adapt: the same with those of the target.
            keys: KEY VALUE of a config whose levels then have statistics of their own.
            as_tested: flags of the model and its training images in passes as at test time, where
                the command has such.
        """
        path = shlex.quote(os.fspath(weights))
        start = f"bn-det recompute --weights {path} --output"
        mended, adapted = (
            f"{name}_again.pth" if os.path.basename(weights) == f"{name}.pth" else f"{name}.pth"
            for name in ("mended", "adapted")
        )
        per_level, needs = IN_CODE.per_level, IN_CODE.needs
        if keys:
            per_level = f"{start} {mended} --population per_domain {model}"
            needs = f"its config needs {' '.join(keys)} from then on"
        usual, initial = (f"{start} {mended}{f} {model}" for f in ("", " --initial"))
        of_target = f"{start} {adapted} {adapt}"
        tested = f"{start} {adapted} {as_tested}" if as_tested else IN_CODE.as_tested
        return cls(usual, initial, per_level, needs, of_target, IN_CODE.frozen, tested)


def _in_code(arguments: str) -> str:
    return f"bn_det.update_bn_stats({arguments}), with call= if there is one"


IN_CODE = Recompute(
    _in_code("model.train(), batches, allow_short=True"),
    _in_code("model.train(), batches, allow_short=True, initial=True"),
    "statistics for each level: MODEL.RETINANET.BN.POPULATION per_domain, or "
    "bn_det.DomainBatchNorm2d in code",
    "the model that loads it needs population per_domain in its bn_det.DomainBatchNorm2d",
    _in_code("model, target, allow_short=True, adabn=True"),
    _in_code("model.train(), batches, allow_short=True, frozen=True"),
    _in_code("model, batches, allow_short=True, adabn=True"),
)


COSTS = 1.0
"""Standard deviations by which a channel's output is off from which on AP is taken to suffer."""


def furthest(off: Mapping[str, tuple[float, float]]) -> tuple[tuple[str, ...], float, float]:
    """The names of layers, the worst first, with its value and the error of that."""
    names = tuple(sorted(off, key=lambda name: -off[name][0]))
    return names, *off[names[0]]


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" + "s" * (number != 1)


class Shift(NamedTuple):
    """How far the statistics of one layer, or of one domain of a layer, are from others.

    Means are in standard deviations of the layer's input, variances relative to its variance; root
    mean squares over channels.

    Attributes:
        name: of the module that holds the statistics.
        mean_shift, var_shift: how far they are off.
        mean_chance, var_chance: by how much they may be, by chance: one standard deviation.
        bound: the multiple of it from which on chance does not explain a shift.
    """

    name: str
    mean_shift: float
    var_shift: float
    mean_chance: float
    var_chance: float
    bound: float

    @property
    def worst(self) -> tuple[float, float] | None:
        """The larger shift that chance does not explain, with its standard deviation by chance."""
        pairs = ((self.mean_shift, self.mean_chance), (self.var_shift, self.var_chance))
        # What is not finite is told by itself.
        off = [pair for pair in pairs if self.bound * pair[1] < pair[0] < math.inf]
        return max(off, default=None)


class Measures(NamedTuple):
    """Of the population statistics of one layer, or of one domain of a layer, from passes.

    Attributes:
        name to bound: of the shift from the statistics of the passes; chance is the noise of an EMA
            and that of the passes.
        noise: by how much the mean of a normalization batch varies from batch to batch, in standard
            deviations; where there are several a pass, of the one that varies most.
        calls: normalization batches of the layer, a pass.
        share: of its variance, what lies between those; None where there is a single one, or none
            that shares its statistics with others.
    """

    name: str
    mean_shift: float
    var_shift: float
    mean_chance: float
    var_chance: float
    bound: float
    noise: float
    calls: int
    share: float | None

    @property
    def worst(self) -> tuple[float, float] | None:
        """That of the shift."""
        return Shift(*self[:6]).worst


class Tried(NamedTuple):
    """What a treatment has brought, on images apart from those that it is made of.

    Attributes:
        name: what was done.
        rules: those of the findings that prescribe it.
        measure: "AP", or "loss".
        before, after: it.
        gain: by how much it is better; infinite if it was not finite before.
        standard_error: of the gain; None for AP.
        helps: whether it is better, and by more than chance where that is known.
        kept: whether the model has been left with it.
        needs: what a checkpoint with it needs beside it, if anything.
        on_target: whether it is of the target's images, and not of the source's.
    """

    name: str
    rules: tuple[str, ...]
    measure: str
    before: float
    after: float
    gain: float
    standard_error: float | None
    helps: bool
    kept: bool
    needs: str
    on_target: bool = False

    def __str__(self) -> str:
        before, after = value_of(self.before), value_of(self.after)
        return f"{self.name}: {self.measure} {before} before, {after} after"


def value_of(measured: float) -> str:
    """A loss or an AP in few digits; a loss that is NaN is taken for an infinite one, as worst."""
    return f"{measured:.4g}" if math.isfinite(measured) else "NaN or infinite"


def signed(gain: float, measure: str) -> str:
    """A gain with its unit, as what is measured changes: the loss falls where it is better."""
    if not math.isfinite(gain):
        return f"a finite {measure}" if gain > 0 else f"no finite {measure}"
    return f"{gain if measure == 'AP' else -gain:+.3g} {measure}"


class Report(NamedTuple):
    """Prints as a verdict in one line, a table of findings, and one of treatments.

    Attributes:
        verdict: what is wrong, where, and what mends it.
        findings: the most severe first.
        layers: what passes have measured, in the order in which layers are called.
        tried: treatments; recomputed statistics first, where anything was tried.
        in_evaluation: how far population statistics are from those of what layers see in
            evaluation mode; empty where losses were not compared.
        on_target: how far the statistics of target images are from those of source images; empty
            where there is no target.
    """

    verdict: str
    findings: list[Finding]
    layers: Sequence[Measures] = ()
    tried: Sequence[Tried] = ()
    in_evaluation: Sequence[Shift] = ()
    on_target: Sequence[Shift] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.verdict,
            "findings": [finite({**of._asdict(), "where": list(of.where)}) for of in self.findings],
            "layers": [finite(of._asdict()) for of in self.layers],
            "tried": [finite({**of._asdict(), "rules": list(of.rules)}) for of in self.tried],
            "in_evaluation": [finite(of._asdict()) for of in self.in_evaluation],
            "on_target": [finite(of._asdict()) for of in self.on_target],
        }

    def __str__(self) -> str:
        from tabulate import tabulate  # not before it is read: the layers need torch alone

        if not self.findings:
            return self.verdict
        table = tabulate(
            [
                [of.severity, of.rule, RULES[of.rule].name, of.place, how_much(of)]
                for of in self.findings
            ],
            ["", "rule", "", "where", "how much"],
            tablefmt="pipe",
            disable_numparse=True,
        )
        details, known = [], set()
        for of in self.findings:
            mend = "as above" if of.treatment in known else of.prescription
            harm = f"\n  {of.untried}" if of.untried and of.treatment not in known else ""
            known.add(of.treatment)
            details.append(f"{of.rule}: {of.why}\n  mend: {mend}{harm}")
        return "\n".join([self.verdict, "", table, "", *details, *self._treatments()])

    def _treatments(self) -> list[str]:
        from tabulate import tabulate

        if not self.tried:
            return []
        heads = ["tried", f"{self.tried[0].measure} before", "after", "", ""]
        rows = [
            [of.name, value_of(of.before), value_of(of.after), gained(of), "kept" * of.kept]
            for of in self.tried
        ]
        table = tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)
        return ["", table]


def gained(of: Tried) -> str:
    """What a treatment has brought, with its standard error and unit."""
    gain = signed(of.gain, of.measure)
    if of.standard_error is None or not math.isfinite(of.gain):
        return gain
    return f"{gain.removesuffix(of.measure)}± {of.standard_error:.1g} {of.measure}"


_LARGE = 1000
"""Beyond which a distance tells no more: of statistics that are of no model."""

_OF_A_SCALE = ("standard deviations", "of loss")


def amount(value: float, digits: int = 3) -> str:
    """A distance or a loss, in words where it is too large to tell anything."""
    return f"more than {_LARGE:g}" if value > _LARGE else f"{value:.{digits}g}"


def how_much(of: Finding) -> str:
    """The value with its standard error and unit."""
    if of.value is None:
        return ""
    error = "" if of.standard_error is None else f" ± {of.standard_error:.1g}"
    unit = RULES[of.rule].unit
    if not math.isfinite(of.value):  # infinite: of a loss that is, or is NaN
        return f"{value_of(of.value)} {unit}"
    if unit in _OF_A_SCALE and of.value > _LARGE:
        return f"{amount(of.value)} {unit}"
    return f"{of.value:.3g}{error} {unit.removesuffix('s') if of.value == 1 else unit}"


HAS_THEM = "the model has them now"
_HOW = "--num-iters or num_iters, of data that has as many"

COSTS_AP = 1.0
"""What a treatment wins back from which on it is no chance, which of a score is not known."""


def make_report(
    findings: Iterable[Finding],
    rules: Collection[str],
    healthy: str,
    layers: Sequence[Measures] = (),
    tried: Sequence[Tried] = (),
) -> Report:
    """Findings in order, and the verdict of the first.

    Of those that are as severe, the first is the one whose treatment has brought most.

    Args:
        rules: what has been looked for; of other rules there are none.
        healthy: the verdict where there are none but notes, and all rules have been looked for.
    """
    if missing := len(RULES) - len(rules):
        healthy = f"nothing is found; {count(missing, 'rule')} left out"
    if tried and tried[0].measure == "AP" and tried[0].gain >= COSTS_AP:
        healthy = f"too few batches to tell what is wrong (give more: {_HOW}), but {tried[0]}"
    elif tried and not any(math.isfinite(m) for of in tried for m in (of.before, of.after)):
        measure = f"the {tried[0].measure} is {value_of(tried[0].after)}"
        healthy = f"{healthy}; {measure} by any statistics, so that they cannot be judged by it"
    elif tried:
        healthy = f"{healthy}; with {tried[0]}"
    ordered = sorted((of for of in findings if of.rule in rules), key=_order)
    first = next(iter(ordered), None)
    folded = next((of for of in ordered if of.rule == "BN103"), None)
    if first is not None and first.severity != "note":
        verdict = _verdict(first, tried)
    elif folded is not None:
        verdict = (
            f"statistics are folded into weight and bias, or were lost, in {folded.place} (BN103): "
            "right in the first case, as long as the layers are frozen; otherwise " + healthy
        )
    else:
        verdict = healthy
    return Report(verdict, ordered, layers, tried)


def _order(of: Finding) -> tuple[int, float, str]:
    return SEVERITIES.index(of.severity), -max(of.gain or 0.0, 0.0), of.rule


def _verdict(first: Finding, tried: Sequence[Tried]) -> str:
    said = f"{RULES[first.rule].says}, in {first.place} ({first.rule})"
    if not tried:
        return f"{said}; {first.prescription}"
    own = next((of for of in tried if first.rule in of.rules), None)
    # What was won on other images is not compared.
    helping = [of for of in tried if of.helps and of.on_target == (own or tried[0]).on_target]
    best = max(helping, key=lambda of: (of.kept, of.gain), default=None)
    if own is None:
        also = f"and {tried[0]}" if tried[0].helps else f"statistics are not it: {tried[0]}"
        return f"{said}; {first.prescription}; {also}"
    if best is None and own.gain > 0:
        return f"{said}; too few batches to tell whether this helps (give more: {_HOW}): {own}"
    if best is None:
        return f"{said}; but this does not help: {own}"
    needs = f"; {best.needs}" if best.needs else ""
    if not own.helps:
        return f"{said}; this does not help: {own}; this does: {best}{needs}"
    also = "" if best is own else f"; {'kept' if best.kept else 'better'}: {best}"
    mend = HAS_THEM if own.kept else first.treatment
    return f"statistics, not weights: {said}: {own}; {mend}{also}{needs}"


def check_rules(rules: Collection[str]) -> None:
    """Raise InputError unless these are ids of rules."""
    if isinstance(rules, str) or not isinstance(rules, Collection):
        raise InputError(
            f"rules: {rules!r} is not accepted; use ids of rules, such as ['BN201', 'BN202']"
        )
    for rule in rules:
        choose("rules", rule, RULES)


def selected(rules: Collection[str], select: Collection[str], ignore: Collection[str]) -> set[str]:
    """The ids that are selected, all by default, and not ignored; each may be the start of some.

    Raises:
        InputError: one is the start of none.
    """
    # What is to be ignored need not be looked for here: one command may be for files and models.
    for flag, names, known in (("--select", select, rules), ("--ignore", ignore, RULES)):
        for name in names:
            if not name or not any(rule.startswith(name) for rule in known):
                raise InputError(f"{flag}: there is no rule {name!r}; {nearest(name, known)}")
    wanted = {r for r in rules if not select or r.startswith(tuple(select))}
    return wanted - {r for r in rules if ignore and r.startswith(tuple(ignore))}
