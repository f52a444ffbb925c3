"""Reports in words: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from tabulate import tabulate

from ..training.spikes import FACTOR, FIRST, LEAST, spike_text
from .claims import Claim
from .looks import Looks
from .power import MOST, seeds_needed
from .published import NUM_GPUS, what_changes
from .report import Report
from .results import Table, Values
from .steps import training_of
from .verdicts import Verdict

SEEDS_NEEDED = "seeds needed"


def cell(values: Values, digits: int) -> str:
    """Values by seed for people: a mean, and a standard deviation where there are several."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {stdev(known):.{digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def cells_text(table: Table, cells: Sequence[Values]) -> list[str]:
    return [cell(v, digits) for v, digits in zip(cells, table.digits, strict=True)]


def table_text(table: Table) -> str:
    """For the terminal."""
    rows = [[*row.label, *cells_text(table, row.cells)] for row in table.rows]
    headers = [*table.labels, *table.columns]
    body = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{table.title}\n{body}"


def ledger_markdown(report: Report) -> str:
    """The ledger as a table."""
    rows = [
        [
            *(claim.sentence, claim.name, wanted(claim), effect_text(verdict)),
            *(word_text(claim, verdict), needed_text(claim, verdict, report.looks)),
        ]
        for claim, verdict in report.ledger
    ]
    headers = ["claim", "name", "what counts", found_text(report.looks), "verdict", SEEDS_NEEDED]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def word_text(claim: Claim, verdict: Verdict) -> str:
    """The verdict; of one seed, which side its hint is on."""
    if verdict.word != "hint":
        return verdict.word or "-"
    if claim.at_most:
        return "hint, for" if verdict.mean <= claim.smallest else "hint, against"
    if abs(verdict.mean) < claim.smallest:
        return "hint, of neither"
    return "hint, for" if verdict.mean > 0 else "hint, against"


def warnings_of(report: Report) -> list[str]:
    """What a reader has to know before the numbers."""
    found, setting = [], report.results.setting
    if setting.opts:
        found.append(
            f"All commands had the options `{' '.join(setting.opts)}`: these are not the settings "
            "that the claims were written down for."
        )
    if setting.data == "coco" and setting.num_gpus != NUM_GPUS:
        found.append(f"{setting.num_gpus} GPUs: {what_changes(setting.num_gpus)}.")
    missing = [s for s in report.steps if s.name not in report.results.outcomes]
    if missing:
        left_out = sum(training_of(step.name) in report.diverged for step in missing)
        why = f", {left_out} of them as their trainings diverged" if left_out else ""
        found.append(f"{len(missing)} of {len(report.steps)} steps are missing{why}.")
    outcomes = report.results.outcomes
    resumed = [s.name for s in report.steps if (of := outcomes.get(s.name)) and of.resumed]
    if resumed:
        found.append(
            f"Interrupted and resumed: {', '.join(f'`{name}`' for name in resumed)}. On Detectron2 "
            "the images come in their first order again from there on, which the seed alone does "
            "not tell."
        )
    return [*found, *(f"Failed: `{f.step.name}`: {f.reason}" for f in report.failures)]


def title_text(report: Report) -> str:
    """What a ledger is of."""
    results = report.results
    seeds = ", ".join(map(str, results.seeds))
    return (
        f"{report.title}: data {results.setting.data}, host {results.setting.host}, seeds {seeds}"
    )


def effect_text(verdict: Verdict) -> str:
    """The mean effect, its interval, the number of seeds, and those that are left out."""
    left_out = "".join(
        f"; {why} seed {', '.join(map(str, seeds))}"
        for why, seeds in (("the loss leapt in", verdict.left_out), ("none of", verdict.unknown))
        if seeds and (verdict.effects or verdict.left_out)
    )
    if not verdict.effects:
        return f"not measured{left_out}"
    digits = 3 if abs(verdict.mean) < 1 else 2
    text = f"{verdict.mean:+.{digits}f}"
    if verdict.low is None:
        return f"{text} (one seed{left_out})"
    ends = f"[{verdict.low:.{digits}f}, {verdict.high:.{digits}f}]"
    return f"{text} {ends} ({len(verdict.effects)}{left_out})"


def spikes_text(report: Report) -> list[str]:
    """Lines on the loss spikes of all trainings, and on those that diverged."""
    lines = [
        f"{name}: {spike_text(spike)}"
        for name, noted in report.spikes.items()
        for spike in noted["spikes"]
    ]
    lines += [
        f"{name}: diverged: its loss was not finite at iteration {iteration}"
        for name, iteration in report.diverged.items()
    ]
    if not report.spikes:
        none = f"Loss spikes: no training has more than {FIRST + LEAST} iterations to look at"
        return [f"{none}{_and_diverged(report)}", *lines]
    name, most = max(
        ((name, noted["largest"]) for name, noted in report.spikes.items()),
        key=lambda of: of[1]["ratio"],
    )
    end = (
        f"the largest loss over its running median: {most['ratio']:.2f}, {name} at iteration "
        f"{most['iteration']}; {FACTOR:g} is a spike"
    )
    count = sum(bool(noted["spikes"]) for noted in report.spikes.values())
    of = f"Loss spikes in {count} of {len(report.spikes)} trainings{_and_diverged(report)}"
    return [f"{of}; {end}", *lines]


def _and_diverged(report: Report) -> str:
    return f", and {len(report.diverged)} diverged" if report.diverged else ""


def wanted(claim: Claim) -> str:
    return f"{'at most' if claim.at_most else 'at least'} {claim.smallest:g} {claim.unit}"


def found_text(looks: Looks) -> str:
    return f"found ({100 * looks.confidence:g} % interval, seeds)"


def needed_text(claim: Claim, verdict: Verdict, looks: Looks) -> str:
    if len(verdict.effects) < 2:
        return "-"
    return str(seeds_needed(claim, verdict, looks.confidence) or f"more than {MOST}")
