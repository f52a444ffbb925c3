"""A model is examined as it is: its state dict, its modules, and on images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from ..errors import check_positive, choose
from ..layers.comm import Group
from ..layers.kinds import unwrapped
from . import from_file, from_model, from_passes
from .checkpoint import of_state
from .findings import IN_CODE, Recompute, Report, count, make_report
from .rules import RULES


def examine(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    num_iters: int = 32,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    rules: Collection[str] = tuple(RULES),
    group: Group = "world",
    progress: str | None = None,
    recompute: Recompute = IN_CODE,
) -> Report:
    """What is wrong with the BatchNorm of a model, whoever wrote it, and what mends it.

        print(bn_det.examine(model, data_loader))

    Nothing of the model changes, whatever fails: it is run in training mode, where its layers
    normalize by their batch, and is then as it was.

    Args:
        batches: training batches, as the model takes them, two at least; None to look at its state
            alone.
        num_iters: the number of batches, at most; of each rank.
        call: how the model is run on a batch, ``model(batch)`` by default.
        rules: ids of those that are to be looked for (:data:`bn_det.doctor.RULES`).
        group: the processes that have to call this, each with the same model.
        progress: "tqdm" for a bar, or None.
        recompute: how statistics are recomputed, in the words of treatments.

    Returns:
        findings, the most severe first; prints as a verdict in one line, and a table.

    Raises:
        InputError: an argument is not accepted; a layer has seen NaN or infinity; there are no
            batches, or the model reaches none of its BatchNorm layers.
        Exception: what the model raises.
    """
    check_positive("num_iters", num_iters)
    for rule in rules:
        choose("rules", rule, RULES)
    model = unwrapped(model)
    checkpoint = of_state(model.state_dict())
    findings = [*from_file.findings_of(checkpoint, recompute), *from_model.findings_of(model)]
    measures = []
    number = count(len(checkpoint.layers), "BatchNorm layer")
    healthy = f"nothing is wrong with the state of its {number}"
    if batches is not None and checkpoint.layers:
        seen = from_passes.look(model, batches, num_iters, call, group, progress)
        findings += [*from_passes.stale(seen, recompute), *from_passes.levels(seen)]
        measures = seen.layers
        if measures:
            healthy = (
                f"nothing is wrong with its {number}: the statistics of {len(measures)}, which "
                f"are not frozen, fit the weights, on {seen.num_batches} batches"
            )
    if not checkpoint.layers:
        healthy = "the model has no BatchNorm with population statistics"
    return make_report(findings, rules, healthy, measures)
