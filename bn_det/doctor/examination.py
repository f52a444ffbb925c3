"""A model is examined as it is: its state dict, its modules, and on images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import chain, takewhile, tee
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import InputError, check_positive
from ..layers.comm import Group, process_group
from ..layers.kinds import unwrapped
from ..population.observation import population_layers
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
from .checkpoint import of_state
from .evaluation import Score, try_treatments
from .findings import IN_CODE, Recompute, Report, check_rules, count, make_report
from .from_losses import has_frozen, num_passes
from .from_passes import Seen
from .from_training import Step
from .losses import Losses, others
from .modes import in_mode
from .prescriptions import KINDS, untried
from .progress import Price, Told
from .rules import RULES
from .treatments import Passes

_LEAST_TO_EVALUATE = 5
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
    treat: bool = False,
    rules: Collection[str] = tuple(RULES),
    group: Group = "world",
    progress: str | None = None,
    recompute: Recompute = IN_CODE,
) -> Report:
    """What is wrong with the BatchNorm of a model, whoever wrote it, and what mends it.

        print(bn_det.examine(model, data_loader))

    Nothing of the model changes, whatever fails: it is run in training mode, where its layers
    normalize by their batch, and is then as it was.

    To tell weights from statistics, ``evaluate`` recomputes statistics and compares losses on
    batches apart: each third one, which are held in memory, half as many as ``num_iters``. That
    takes eight forward passes of each where samples are drawn in training (of RoIs), or else seven;
    one more with frozen layers; and where statistics are the fault up to 16 more.

    Args:
        batches: training batches, as the model takes them, two at least; None to look at its state
            alone.
        num_iters: the number of batches, at most; of each rank.
        call: how the model is run on a batch, ``model(batch)`` by default. To evaluate, it gives a
            loss, or a dict of losses.
        target: batches of the images that the model is to be used on, where they are of another
            domain; as many of them as of ``batches`` are run in the same way.
        optimizer: that is to train the model, of which the parameter groups are looked at.
        step: what a step of it is of, where that is more than a batch of this process.
        evaluate: whether to compare losses; in one process.
        score: of a model in evaluation mode, in percent, such as its AP: higher is better.
            Treatments are judged by it; by the loss without it.
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
            batches, or the model reaches none of its BatchNorm layers; the optimizer has none of
            its parameters; to evaluate, it gives no loss, or there are several processes.
        Exception: what the model raises.
    """
    check_positive("num_iters", num_iters)
    check_rules(rules)
    told = Told(progress)
    if target is not None and batches is None:
        raise InputError("target: batches of a target are not accepted without batches of a source")
    if evaluate := evaluate or treat:
        _check_evaluation(batches, num_iters, group)
    model = unwrapped(model)
    _check_values(model)
    checkpoint = of_state(model.state_dict())._replace(momenta=from_model.momenta(model))
    findings = [*from_file.findings_of(checkpoint, recompute), *from_model.findings_of(model)]
    if optimizer is not None:
        findings += from_training.of_optimizer(model, optimizer)
    if not checkpoint.layers or batches is None:
        findings = untried(findings, recompute)
    if not checkpoint.layers:
        return make_report(findings, rules, "the model has no BatchNorm with population statistics")
    if batches is None:
        number = count(len(checkpoint.layers), "BatchNorm layer")
        return make_report(findings, rules, f"nothing is wrong with the state of its {number}")
    has_target = target is not None
    held: list[Any] = []
    rest = others(batches, held) if evaluate else batches
    again: Iterable[Any] = ()
    if evaluate and has_frozen(model):
        rest, again = tee(rest)
    price = _price(model, num_iters, evaluate, score, has_target)
    told.line(str(price))
    try:
        of_passes = told.passes(rest, price)
        seen = from_passes.look(model, of_passes, num_iters, call, group, told.bars, has_target)
    except InputError as e:
        # Weights that are not finite give no statistics: what the state shows is the answer.
        if not any(of.severity == "error" for of in findings):
            raise
        report = make_report(untried(findings, recompute), rules, "")
        return report._replace(verdict=f"{report.verdict}; nothing was seen on images: {e}")
    findings += from_passes.findings_of(seen, recompute)
    findings += from_training.small_batches(seen.called, step or Step())
    on_target = []
    if has_target:
        of_target = _look_at_target(model, target, num_iters, call, group, told.bars)
        on_target = from_target.shifts(seen, of_target)
        findings += from_target.findings_of(on_target, seen.frozen, recompute)
    tried, in_evaluation = [], []
    if not evaluate:
        findings = untried(findings, recompute)
    else:
        # The passes take none where all layers are frozen.
        deque(takewhile(lambda _: len(held) < num_iters // 2, rest), maxlen=0)
        losses = Losses(model, call, held, told)
        compared = from_losses.compare(losses, seen)
        findings += from_losses.findings_of(compared, recompute)
        in_evaluation = from_evaluation.shifts(compared.inputs)
        findings += from_evaluation.findings_of(in_evaluation, compared.inputs, recompute)
        if any(of.rule == "BN202" for of in findings):
            # Statistics of each level may be what its batch is better for.
            findings = [of for of in findings if of.rule != "BN303"]
        findings = [of for of in findings if of.rule in rules]
        passes = Passes(call, again, num_iters, told.bars)
        findings, tried = try_treatments(
            findings, seen, compared, losses, passes, score, recompute, treat
        )
    healthy = _healthy(seen, len(checkpoint.layers))
    report = make_report(findings, rules, healthy, seen.layers, tried)
    return report._replace(in_evaluation=in_evaluation, on_target=on_target)


def _look_at_target(
    model: nn.Module, target: Iterable[Any], num_iters: int, *how: Any
) -> from_passes.Seen:
    try:
        return from_passes.look(model, target, num_iters, *how, frozen=True)
    except InputError as e:
        raise InputError(f"target: {e}") from e


def _check_values(model: nn.Module) -> None:
    tensors = chain(model.named_parameters(), model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise InputError(
            f"model: {empty[0]} and {len(empty) - 1} more are on the meta device, where nothing "
            "has a value; load its weights (load_state_dict(..., assign=True))"
        )


def _price(
    model: nn.Module, num_iters: int, evaluate: bool, score: Score | None, has_target: bool
) -> Price:
    with in_mode(model, training=True):
        moving = bool(population_layers(model))
    price = Price(num_iters * (moving or has_target), target=num_iters * has_target)
    if not evaluate:
        return price
    return price._replace(
        held=num_iters // 2,
        passes=num_passes(model),
        more=2 * MOST_PARTS * moving + (len(KINDS) - 1) * (score is None),
        again=num_iters * has_frozen(model),
        has_score=score is not None,
    )


def _check_evaluation(batches: Iterable[Any] | None, num_iters: int, group: Group) -> None:
    if batches is None:
        raise InputError("evaluate: True is not accepted without batches")
    if num_iters < _LEAST_TO_EVALUATE:
        raise InputError(
            f"num_iters: {num_iters} is not accepted; to evaluate, use {_LEAST_TO_EVALUATE} or more"
        )
    if process_group(group) is not None:
        raise InputError("evaluate: True is not accepted in several processes; call it in one")


def _healthy(seen: Seen, num_layers: int) -> str:
    number = count(num_layers, "BatchNorm layer")
    if not seen.layers:
        return f"nothing is wrong with the state of its {number}"
    return (
        f"nothing is wrong with its {number}: the statistics of {len(seen.layers)}, which are not "
        f"frozen, fit the weights, on {seen.num_batches} batches"
    )
