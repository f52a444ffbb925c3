"""A model is examined as it is: its state dict, its modules, and on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError, check_positive, of_other_type, shown
from ..layers.comm import Group, process_group
from ..layers.freeze import is_frozen
from ..layers.kept import as_frozen
from ..layers.kinds import batch_norms, eps_of, is_batch_norm, refuse_meta, unwrapped
from ..population.calling import ITERABLE, is_iterable
from ..population.observation import is_l1, places_with_statistics, population_layers
from . import (
    from_evaluation,
    from_file,
    from_losses,
    from_model,
    from_passes,
    from_target,
    from_training,
)
from .blame import MOST_PARTS
from .checkpoint import Checkpoint, of_state
from .evaluation import Score, try_on_target, try_treatments
from .findings import (
    IN_CODE,
    Finding,
    Recompute,
    Report,
    Shift,
    Tried,
    check_rules,
    count,
    make_report,
)
from .from_losses import has_frozen, num_passes
from .from_passes import USUAL, Seen
from .from_training import Step
from .images import Images
from .losses import Losses
from .modes import in_mode
from .prescriptions import KINDS, RECOMPUTED, kinds_of, untried
from .progress import Price, Told
from .rules import RULES
from .treatments import Passes, shares_population

LEAST_TO_EVALUATE = 5
"""Batches, beside which two are held apart."""


def examine(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    num_iters: int = 32,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    target: Iterable[Any] | None = None,
    optimizer: Optimizer | None = None,
    step: Step | None = None,
    evaluate: bool = False,
    score: Score | None = None,
    target_score: Score | None = None,
    treat: bool = False,
    rules: Collection[str] = tuple(RULES),
    group: Group = "world",
    progress: str | None = None,
    recompute: Recompute = IN_CODE,
) -> Report:
    """What is wrong with the BatchNorm of a model, whoever wrote it, and what mends it.

        print(bn_det.examine(model, data_loader))

    Nothing of the model changes, whatever fails: it is run in training mode, where its layers
    normalize by their batch, and is then as it was. Layers that a train() of its own keeps in
    evaluation mode (``norm_eval``) count as frozen.

    To tell weights from statistics, ``evaluate`` recomputes statistics and compares losses on
    batches apart: each third one, which are held in memory, half as many as ``num_iters``. That
    takes eight forward passes of each where samples are drawn in training (of RoIs), or else seven;
    one more with frozen layers; and where statistics are the fault up to 16 more, and 6 beyond
    where no score tells treatments apart.

    Args:
        batches: training batches, as the model takes them, two at least; None to look at its state
            alone.
        num_iters: the number of batches, at most; of each rank.
        call: how the model is run on a batch, in the mode that it is in; ``model(batch)`` by
            default, where a tuple may be several arguments
            (:func:`bn_det.population.calling.called`). To evaluate, it gives a loss, or a dict of
            losses.
        target: batches of the images that the model is to be used on, where they are of another
            domain; as many of them as of ``batches`` are run in the same way.
        optimizer: that is to train the model, of which the parameter groups are looked at.
        step: what a step of it is of, where that is more than a batch of this process.
        evaluate: whether to compare losses; in one process.
        score: of a model in evaluation mode, in percent, such as its AP: higher is better.
            Treatments are judged by it; by the loss without it.
        target_score: the same on the target's images, where these have labels. With ``evaluate``
            the target's statistics (AdaBN) are judged by it, on the images that they are of.
        treat: whether to leave the model with the treatment that helps most, if something is wrong
            that it is to mend, and the loss falls by more than chance explains, or the score rises.
            It includes ``evaluate``.
        rules: ids of those that are to be looked for (:data:`bn_det.doctor.RULES`).
        group: the processes that have to call this, each with the same model.
        progress: "tqdm" for bars, "log" for lines in the log, or None. Either says first what the
            examination takes.
        recompute: how statistics are recomputed, in the words of treatments.

    Returns:
        findings, the most severe first; prints as a verdict in one line, and a table.

    Raises:
        InputError: an argument is not accepted; a layer has seen NaN or infinity; there are no
            batches, or the model reaches none of its BatchNorm layers, or all batches are empty;
            the optimizer has none of its parameters; to evaluate, it gives no loss, or there are
            several processes.
        Exception: what the model raises.
    """
    given = {"model": model, "batches": batches, "target": target, "step": step, "call": call}
    _check_types(**given, score=score, target_score=target_score)
    check_positive("num_iters", num_iters)
    check_rules(rules)
    if target is not None and batches is None:
        raise InputError("target: batches of a target are not accepted without batches of a source")
    if target_score is not None and target is None:
        raise InputError("target_score: it is not accepted without target")
    if score is not None and not (evaluate or treat):
        raise InputError("score: it is not accepted without evaluate or treat, which ask for it")
    step = step or Step()
    for key, number in step._asdict().items():
        if not 0 < number < math.inf:
            raise InputError(f"step: {key} {number!r} is not accepted; use a number above 0")
    if evaluate := evaluate or treat:
        _check_evaluation(batches, num_iters, group)
    model = unwrapped(model)
    refuse_meta("model", model)
    with as_frozen(model):
        with torch.no_grad():
            checkpoint = _checkpoint(model)
            recompute = from_file.suited(recompute, checkpoint)
            findings = [
                *from_file.findings_of(checkpoint, recompute),
                *from_model.findings_of(model, recompute),
            ]
        if optimizer is not None:
            findings += from_training.of_optimizer(model, optimizer)
        if not checkpoint.layers:
            healthy = "the model has no BatchNorm with population statistics"
            return make_report(untried(findings, recompute), rules, healthy)
        unseen = _unseen(model, checkpoint)
        if batches is None or len(unseen) == len(checkpoint.layers):
            healthy = _healthy_state(checkpoint) + _not_seen(unseen) * (batches is not None)
            return make_report(untried(findings, recompute), rules, healthy)
        told = Told(progress)
        examination = _Examination(model, num_iters, call, group, told, recompute, findings, step)
        images = Images(batches, evaluate, evaluate and has_frozen(model))
        scores = score is not None, target_score is not None
        price = _price(model, num_iters, evaluate, *scores, target is not None)
        told.line(str(price))
        try:
            seen = examination.look(told.passes(images.rest, price), frozen=target is not None)
        except InputError as e:
            # Weights that are not finite give no statistics: what the state shows is the answer.
            if not any(of.severity == "error" for of in findings):
                raise
            report = make_report(untried(findings, recompute), rules, "")
            return report._replace(verdict=f"{report.verdict}; nothing was seen on images: {e}")
        examination.of_passes(seen)
        of_target: Seen | None = None
        on_target: list[Shift] = []
        if target is not None:
            of_target = examination.of_target(target)
            on_target = examination.on_target(seen, of_target)
        tried: list[Tried] = []
        in_evaluation: list[Shift] = []
        if evaluate:
            tried, in_evaluation = examination.evaluated(seen, images, score, rules, treat)
            if of_target is not None and target_score is not None:
                tried += examination.adapted(of_target, target_score)
        else:
            examination.findings = untried(examination.findings, recompute)
        healthy = _healthy(seen, checkpoint) + _not_seen(unseen)
        report = make_report(examination.findings, rules, healthy, seen.layers, tried)
        verdict = report.verdict + _few(seen)
        return report._replace(verdict=verdict, in_evaluation=in_evaluation, on_target=on_target)


class _Examination:
    """The steps of an examination on images, which add to the findings."""

    def __init__(
        self,
        model: nn.Module,
        num_iters: int,
        call: Callable[[nn.Module, Any], Any] | None,
        group: Group,
        told: Told,
        recompute: Recompute,
        findings: list[Finding],
        step: Step,
    ) -> None:
        self.model, self.num_iters, self.call, self.group = model, num_iters, call, group
        self.told, self.recompute, self.findings, self.step = told, recompute, findings, step

    def look(self, batches: Iterable[Any], frozen: bool) -> Seen:
        how = self.num_iters, self.call, self.group, self.told.bars
        return from_passes.look(self.model, batches, *how, frozen, self.step)

    def of_passes(self, seen: Seen) -> None:
        self.findings = [
            *from_passes.counted(self.findings, seen),
            *from_passes.findings_of(seen, self.recompute),
        ]
        self.findings += from_training.small_batches(seen.called, self.step)

    def of_target(self, target: Iterable[Any]) -> Seen:
        try:
            return self.look(target, frozen=True)
        except InputError as e:
            raise InputError(f"target: {e}") from e

    def on_target(self, seen: Seen, of_target: Seen) -> list[Shift]:
        shifts = from_target.shifts(seen, of_target)
        self.findings += from_target.findings_of(shifts, seen.frozen, self.recompute)
        return shifts

    def evaluated(
        self,
        seen: Seen,
        images: Images,
        score: Score | None,
        rules: Collection[str],
        keep: bool,
    ) -> tuple[list[Tried], list[Shift]]:
        """What treatments have brought, and how far statistics are off in evaluation mode.

        Args:
            keep: whether to leave the model with the treatment that helps most.
        """
        losses = Losses(self.model, self.call, images.held(self.num_iters // 2), self.told)
        compared = from_losses.compare(losses, seen)
        shifts = from_evaluation.shifts(compared.inputs)
        own = sorted({of.rule for of in self.findings if _is_of_statistics(of, self.recompute)})
        found = [
            *self.findings,
            *from_losses.findings_of(compared, self.recompute),
            *from_evaluation.findings_of(shifts, compared.inputs, self.recompute, own),
        ]
        if any(of.rule == "BN202" for of in found):
            # Statistics of each level may be what its batch is better for.
            found = [of for of in found if of.rule != "BN303"]
        found = [of for of in found if of.rule in rules]
        passes = Passes(self.call, images.again, self.num_iters, self.told.bars)
        self.findings, tried = try_treatments(
            found, seen, compared, losses, passes, score, self.recompute, keep
        )
        return tried, shifts

    def adapted(self, of_target: Seen, score: Score) -> list[Tried]:
        """What the target's statistics have brought there."""
        self.findings, tried = try_on_target(
            self.findings, self.model, of_target.statistics, score, self.told
        )
        return tried


def _is_of_statistics(of: Finding, recompute: Recompute) -> bool:
    """Whether it is an alarm that recomputed statistics are prescribed for."""
    return of.severity != "note" and RECOMPUTED in kinds_of(of, recompute)


def _check_types(**given: Any) -> None:
    for key, value in given.items():
        fits, accepted = _TYPES[key]
        if not fits(value) and (value is not None or key == "model"):
            raise of_other_type(key, value, accepted)


_TYPES = {
    "model": (lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
    "batches": (is_iterable, ITERABLE),
    "target": (is_iterable, ITERABLE),
    "step": (lambda value: isinstance(value, Step), "a bn_det.doctor.Step"),
    "call": (callable, "a function of the model and a batch"),
    "score": (callable, "a function of the model"),
    "target_score": (callable, "a function of the model"),
}
"""What arguments of examine are, and that in words."""


def _checkpoint(model: nn.Module) -> Checkpoint:
    """The state of a model, as a file has it; what is frozen has no counter that tells anything."""
    found = of_state(model.state_dict())
    owners = {shown(place.name): place.owner for place in places_with_statistics(model)}
    layers = []
    for of in found.layers:
        if (owner := owners.get(of.name)) is not None:
            batches = None if is_frozen(owner) else of.batches
            of = of._replace(batches=batches, eps=eps_of(owner))
        layers.append(of)
    return found._replace(layers=layers, momenta=from_model.momenta(model))


def _unseen(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """What has statistics that passes do not show, by name, with the reason."""
    modules = {shown(name): of for name, of in model.named_modules(remove_duplicate=False)}
    return {of.name: why for of in checkpoint.layers if (why := _why_unseen(modules.get(of.name)))}


def _why_unseen(module: nn.Module | None) -> str:
    if module is not None and is_batch_norm(module):
        return "which has mean absolute deviations, and no variances" * is_l1(module)
    kind = getattr(module, "original_name", type(module).__name__)
    return (
        f"of a class ({kind}) that is no BatchNorm of torch's, nor derived from one (of a "
        "scripted, traced or exported model examine what it was made from)"
    )


def _price(
    model: nn.Module,
    num_iters: int,
    evaluate: bool,
    has_score: bool,
    has_target_score: bool,
    has_target: bool,
) -> Price:
    with in_mode(model, training=True):
        moving = bool(population_layers(model))
    price = Price(num_iters * (moving or has_target), target=num_iters * has_target)
    if not evaluate:
        return price
    return price._replace(
        held=num_iters // 2,
        passes=num_passes(model),
        # One of RoIs, which the model may not have.
        more=1 + 2 * MOST_PARTS * moving + (len(KINDS) - 1) * (not has_score),
        again=num_iters * has_frozen(model) * (1 + any(map(shares_population, batch_norms(model)))),
        has_score=has_score,
        has_target_score=has_target_score,
    )


def _check_evaluation(batches: Iterable[Any] | None, num_iters: int, group: Group) -> None:
    if batches is None:
        raise InputError("evaluate: True is not accepted without batches")
    if num_iters < LEAST_TO_EVALUATE:
        raise InputError(
            f"num_iters: {num_iters} is not accepted; to evaluate, use {LEAST_TO_EVALUATE} or more"
        )
    if process_group(group) is not None:
        raise InputError("evaluate: True is not accepted in several processes; call it in one")


def _layers(number: int) -> str:
    return count(number, "BatchNorm layer")


def _healthy(seen: Seen, checkpoint: Checkpoint) -> str:
    if not seen.layers:
        return _healthy_state(checkpoint)
    return (
        f"nothing is wrong with its {_layers(len(checkpoint.layers))}: the statistics of "
        f"{len(seen.layers)}, which are not frozen, fit the weights, on {seen.num_batches} batches"
    )


def _few(seen: Seen) -> str:
    """What is to be said of a verdict, and of a treatment, by few batches."""
    if not seen.layers or seen.num_batches >= USUAL:
        return ""
    return (
        f"; {seen.num_batches} batches are few to tell a fault from chance, and for statistics of "
        f"them: {USUAL} and more are better"
    )


def _healthy_state(checkpoint: Checkpoint) -> str:
    return f"nothing is wrong with the state of its {_layers(len(checkpoint.layers))}"


def _not_seen(unseen: Mapping[str, str]) -> str:
    """What is to be said of layers that passes do not show.

    Args:
        unseen: why, by name.
    """
    if not unseen:
        return ""
    (first, why), *others = unseen.items()
    also = f" and {len(others)} more" if others else ""
    return f"; not seen on images: {first}{also}, {why}"
