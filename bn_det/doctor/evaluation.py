"""Treatments are tried: which one mends a model is judged on images apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..population.snapshot import Snapshot
from .findings import COSTS_AP, Finding, Recompute, Tried
from .from_losses import Compared, Difference, noise_of_an_ema
from .from_passes import Seen
from .losses import Losses, Values, put
from .modes import in_mode
from .prescriptions import ADAPTED, RECOMPUTED, Kind, kinds_of
from .progress import Told
from .treatments import Passes, Treatment, put_back, treatments

T = TypeVar("T")
Score = Callable[[nn.Module], float]
"""Of a model in evaluation mode, such as its AP: higher is better."""


def try_treatments(
    findings: Sequence[Finding],
    seen: Seen,
    compared: Compared,
    losses: Losses,
    passes: Passes,
    score: Score | None,
    recompute: Recompute,
    keep: bool,
) -> tuple[list[Finding], list[Tried]]:
    """Findings with what the treatments that they prescribe have brought, and these.

    Args:
        keep: whether to leave the model with the one that helps most, if one does.
    """
    of_findings, failed = treatments(losses.model, seen, findings, passes, recompute)
    trials = Trials(of_findings, losses, compared, score)
    tried = trials.tried(findings, recompute)
    told = with_gains(findings, trials, tried, failed, recompute)
    alarms = {of.rule for of in told if of.severity != "note"}
    return told, keep_best(losses.model, tried, of_findings, alarms) if keep else tried


def try_on_target(
    findings: Sequence[Finding], model: nn.Module, statistics: Values, score: Score, told: Told
) -> tuple[list[Finding], list[Tried]]:
    """Findings with what the target's own statistics (AdaBN) have brought on its images, and that.

    The model is left as it was: what it is for is for its user to say.

    Args:
        statistics: of the target's images, of layers that are not frozen.
        score: on the target.
    """
    if not statistics or not any(of.rule in ADAPTED.rules for of in findings):
        return [*findings], []
    treatment = Treatment(ADAPTED, lambda model: put(model, statistics), stays=False)
    with in_mode(model, training=False), told.bar("AP on the target", 2) as step:

        def scored() -> float:
            value = float(_number(score(model)))
            step()
            return value

        before, after = scored(), _treated(model, treatment, scored)
    gain = after - before
    found = [
        of._replace(gain=gain, measure="AP", untried="") if of.rule in ADAPTED.rules else of
        for of in findings
    ]
    of_kind = ADAPTED.name, ADAPTED.rules, "AP"
    tried = Tried(*of_kind, before, after, gain, None, gain > 0, False, "", on_target=True)
    return found, [tried]


class Trials:
    """What treatments of a model bring; it is left as it was.

    Attributes:
        treatments: recomputed statistics first.
        gains: of each, by how much it is better: of each batch, or a single one of the score.
    """

    def __init__(
        self,
        treatments: Sequence[Treatment],
        losses: Losses,
        compared: Compared,
        score: Score | None,
    ) -> None:
        self.treatments = treatments
        self.measure = "loss" if score is None else "AP"
        self._noise = noise_of_an_ema(compared.noisy)
        model = losses.model
        if score is None:
            self._before = compared.old
            rest = treatments[1:]
            with losses.passes("treatments", len(rest)):
                more = [_treated(model, of, losses.of) for of in rest]
            self._afters = [compared.new, *more]
            self.gains = [self._before - after for after in self._afters]
        else:
            with in_mode(model, training=False), losses.told.bar("AP", 1 + len(treatments)) as step:

                def scored() -> Tensor:
                    value = _number(score(model))
                    step()
                    return value

                self._before = scored()
                self._afters = [_treated(model, of, scored) for of in treatments]
            self.gains = [after - self._before for after in self._afters]

    def tried(self, findings: Sequence[Finding], recompute: Recompute) -> list[Tried]:
        """All of them, in words; none is kept."""
        found = []
        for of, after, gains in zip(self.treatments, self._afters, self.gains, strict=True):
            rules = dict.fromkeys(f.rule for f in findings if of.kind in kinds_of(f, recompute))
            gain = self._difference(gains)
            error = None if self.measure == "AP" else gain.error
            of_kind = of.kind.name, tuple(rules), self.measure
            values = float(self._before.mean()), float(after.mean()), gain.value
            found.append(Tried(*of_kind, *values, error, gain.is_more, False, of.needs))
        return found

    def _difference(self, gains: Tensor) -> Difference:
        """Chance in a score is not known."""
        if self.measure == "AP":
            return Difference(float(gains), 0.0, 0.0)
        return Difference.of(gains, len(self.treatments))

    def helps_more(self, number: int) -> bool:
        """Whether a treatment helps, and more than recomputed statistics do.

        Certain differences of a loss may be too small to matter: what it gains is to be more than
        the noise of an EMA makes.
        """
        gain, more = self.gains[number], self.gains[number] - self.gains[0]
        if self.measure == "AP":
            return min(float(gain), float(more)) >= COSTS_AP
        matters = float(gain.mean()) > self._noise.bound
        return matters and self._difference(gain).is_more and self._difference(more).is_more


def _number(scored: Any) -> Tensor:
    """Shape (1,).

    Raises:
        InputError: it is no number.
    """
    try:
        return torch.tensor([float(scored)]).double()
    except (TypeError, ValueError, RuntimeError) as e:
        kind = type(scored).__name__
        raise InputError(f"score: gives a {kind}; it has to give a number, in percent") from e


def _treated(model: nn.Module, treatment: Treatment, measured: Callable[[], T]) -> T:
    with put_back(model):
        treatment.apply(model)
        return measured()


def with_gains(
    findings: Sequence[Finding],
    trials: Trials,
    tried: Sequence[Tried],
    failed: Mapping[Kind, str],
    recompute: Recompute,
) -> list[Finding]:
    """Findings with what their treatments have brought.

    What is mended by a treatment of its own, which helps more than recomputed statistics, costs: it
    is an error.
    """
    numbers = {of.kind: k for k, of in enumerate(trials.treatments)}
    found = []
    for of in findings:
        kinds = kinds_of(of, recompute)
        # Two kinds of the same rules are one treatment in two directions.
        either = [numbers[k] for k in kinds if k in numbers and k.rules == kinds[0].rules]
        number = max(either, key=lambda k: tried[k].gain, default=None)
        if number is not None:
            of = of._replace(gain=tried[number].gain, measure=trials.measure)
            if trials.treatments[number].kind is not RECOMPUTED and trials.helps_more(number):
                of = of._replace(severity="error")
        elif kinds:
            of = of._replace(untried=failed.get(kinds[0], kinds[0].may_harm))
        found.append(of)
    return found


def keep_best(
    model: nn.Module,
    tried: Sequence[Tried],
    treatments: Sequence[Treatment],
    alarms: Collection[str],
) -> list[Tried]:
    """Leave a model with the treatment that helps most, of those that mend an alarm and stay.

    Args:
        alarms: rules of errors and warnings.
    """
    helping = {
        of: treatment
        for of, treatment in zip(tried, treatments, strict=True)
        if of.helps and treatment.stays and not set(of.rules).isdisjoint(alarms)
    }
    best = max(helping, key=lambda of: of.gain, default=None)
    if best is not None:
        snapshot = Snapshot(model)
        try:
            helping[best].apply(model)
        except BaseException:
            snapshot.restore()
            raise
    return [of._replace(kept=of is best) for of in tried]
