"""A model is examined as it is: its state dict, its modules, and on images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import takewhile
from typing import Any

from torch import nn

from ..errors import InputError, check_positive, choose
from ..layers.comm import Group, process_group
from ..layers.kinds import unwrapped
from . import from_evaluation, from_file, from_losses, from_model, from_passes, from_target
from .checkpoint import of_state
from .evaluation import Score, is_mended, try_statistics, with_gain
from .findings import IN_CODE, Recompute, Report, count, make_report
from .from_passes import Seen
from .losses import Losses, others, put
from .rules import RULES

_LEAST_TO_EVALUATE = 5
"""Batches, beside which two are held apart."""


def examine(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    num_iters: int = 32,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    target: Iterable[Any] | None = None,
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
        evaluate: whether to compare losses; in one process.
        score: of a model in evaluation mode, in percent, such as its AP: higher is better.
            Recomputed statistics are judged by it; by the loss without it.
        treat: whether to leave the model with the recomputed statistics, if something is wrong that
            these are to mend, and they do better. It includes ``evaluate``.
        rules: ids of those that are to be looked for (:data:`bn_det.doctor.RULES`).
        group: the processes that have to call this, each with the same model.
        progress: "tqdm" for a bar, or None.
        recompute: how statistics are recomputed, in the words of treatments.

    Returns:
        findings, the most severe first; prints as a verdict in one line, and a table.

    Raises:
        InputError: an argument is not accepted; a layer has seen NaN or infinity; there are no
            batches, or the model reaches none of its BatchNorm layers; to evaluate, it gives no
            loss, or there are several processes.
        Exception: what the model raises.
    """
    check_positive("num_iters", num_iters)
    for rule in rules:
        choose("rules", rule, RULES)
    if target is not None and batches is None:
        raise InputError("target: batches of a target are not accepted without batches of a source")
    if evaluate := evaluate or treat:
        _check_evaluation(batches, num_iters, group)
    model = unwrapped(model)
    checkpoint = of_state(model.state_dict())
    findings = [*from_file.findings_of(checkpoint, recompute), *from_model.findings_of(model)]
    if not checkpoint.layers:
        return make_report(findings, rules, "the model has no BatchNorm with population statistics")
    if batches is None:
        number = count(len(checkpoint.layers), "BatchNorm layer")
        return make_report(findings, rules, f"nothing is wrong with the state of its {number}")
    has_target = target is not None
    held: list[Any] = []
    rest = others(batches, held) if evaluate else batches
    try:
        seen = from_passes.look(model, rest, num_iters, call, group, progress, has_target)
    except InputError as e:
        # Weights that are not finite give no statistics: what the state shows is the answer.
        if not any(of.severity == "error" for of in findings):
            raise
        report = make_report(findings, rules, "")
        return report._replace(verdict=f"{report.verdict}; nothing was seen on images: {e}")
    findings += from_passes.findings_of(seen, recompute)
    on_target = []
    if has_target:
        of_target = _look_at_target(model, target, num_iters, call, group, progress)
        on_target = from_target.shifts(seen, of_target)
        findings += from_target.findings_of(on_target, seen.frozen, recompute)
    tried, in_evaluation = None, []
    if evaluate:
        # The passes take none where all layers are frozen.
        deque(takewhile(lambda _: len(held) < num_iters // 2, rest), maxlen=0)
        compared = from_losses.compare(Losses(model, call, held), seen)
        findings += from_losses.findings_of(compared, recompute)
        in_evaluation = from_evaluation.shifts(compared.inputs)
        findings += from_evaluation.findings_of(in_evaluation, compared.inputs, recompute)
        tried = try_statistics(model, seen.statistics, compared, score)
        findings = with_gain(findings, tried, recompute)
        if treat and is_mended([of for of in findings if of.rule in rules]):
            put(model, seen.statistics)
            tried = tried._replace(kept=True)
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
