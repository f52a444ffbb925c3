"""What can be told of a model's BatchNorm from how it is trained: optimizer, batches and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError, of_other_type
from ..layers.freeze import affines_of, is_frozen, learns
from ..layers.kinds import batch_norms
from .findings import Finding, count

FEW = 2
"""Samples in a normalization batch, up to which it is called small.

BatchNorm on ImageNet: an error of 34.7 % with 2 images, 27.3 % with 4 and 23.6 % with 32 (Wu & He,
Group Normalization, 2018, Table 2).
"""


MEND_PROBED = "bn_det.no_population_update(model) around what only looks, or model.eval() before it"

MEND_REPEATED = (
    "BatchNorm of ours where activations are checkpointed, which knows recomputations "
    "(bn_det.convert_batchnorm(model, bn_det.BatchNorm2d))"
)


class Step(NamedTuple):
    """What a step of an optimizer is of, where the batches that are examined do not show it.

    Attributes:
        processes: that share gradients, each with batches of its own.
        batches: of each process, whose gradients are accumulated.
        share: the samples that a process of the training normalizes at a time, in those of a batch
            that is examined.
    """

    processes: int = 1
    batches: int = 1
    share: float = 1.0


def of_optimizer(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """BN501 and BN504.

    Raises:
        InputError: it has no parameter of the model.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise of_other_type("optimizer", optimizer, "a torch.optim.Optimizer")
    times = Counter(id(p) for group in groups for p in group["params"])
    if not any(id(p) in times for p in model.parameters()):
        raise InputError(
            "optimizer: it has none of the model's parameters; give it those of this model, as it "
            "is now"
        )
    decay_of = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
    names = batch_norms(model)
    affines = {
        names[layer]: list(filter(learns, affine))
        for layer, affine in affines_of(model, names).items()
    }
    yield from _decayed(affines, decay_of)
    yield from _not_once(affines, times)


def _decayed(affines: Mapping[str, Sequence[Tensor]], decay_of: Mapping[int, float]) -> Iterator:
    """BN501."""
    decays = {n: max((decay_of.get(id(p), 0) for p in of), default=0) for n, of in affines.items()}
    found = tuple(name for name, decay in decays.items() if decay > 0)
    if found:
        most = max(decays.values())
        why = (
            f"the optimizer pulls weight and bias of {count(len(found), 'layer')} towards 0, by a "
            f"weight decay of {most:g}"
        )
        treatment = (
            "a parameter group of theirs with weight_decay 0 (SOLVER.WEIGHT_DECAY_NORM 0.0, and "
            "SOLVER.WEIGHT_DECAY_BIAS as well, if it is set)"
        )
        yield Finding("BN501", "note", found, float(most), why, treatment)


def _not_once(affines: Mapping[str, Sequence[Tensor]], times: Counter[int]) -> Iterator[Finding]:
    """BN504."""
    missing = tuple(name for name, of in affines.items() if any(id(p) not in times for p in of))
    if missing:
        why = (
            f"weight or bias of {count(len(missing), 'layer')} need a gradient and are in no group "
            "of the optimizer: they stay as they are"
        )
        treatment = "optimizer.add_param_group, or bn_det.freeze(model, NAMES) if that is meant"
        yield Finding("BN504", "warning", missing, len(missing), why, treatment)
    often = tuple(name for name, of in affines.items() if any(times[id(p)] > 1 for p in of))
    if often:
        most = max(times[id(p)] for name in often for p in affines[name])
        why = (
            f"weight or bias of {count(len(often), 'layer')} stand {most} times in a group of the "
            "optimizer, which steps as often"
        )
        treatment = "name each parameter once, as model.parameters() does"
        yield Finding("BN504", "warning", often, len(often), why, treatment)


def by_whole_batch(layer: nn.Module) -> bool:
    """Whether the batch that a layer is called with normalizes, in training, and nothing else.

    Ghost batches are as small as somebody wants; renormalization is made for small ones.
    """
    return not (
        is_frozen(layer)
        or getattr(layer, "ghost_size", None) is not None
        or getattr(layer, "renorm", None) is not None
        or getattr(layer, "train_statistics", "batch") == "population"
    )


def small_batches(called: Mapping[str, tuple[nn.Module, float]], step: Step) -> Iterator[Finding]:
    """BN502.

    Args:
        called: by name, a layer in training mode, and the samples that it is called with at a time.
    """
    few = {}
    for name, (layer, samples) in called.items():
        processes = step.processes if is_synchronized(layer) else 1
        size = samples * share_of_batch(layer, step)
        if size <= FEW and by_whole_batch(layer):
            few[name] = (size, processes)
    if not few:
        return
    names = tuple(sorted(few, key=lambda name: few[name]))
    least, processes = few[names[0]]
    times = step.processes * step.batches // processes
    of_step = f", where a step of the optimizer has {times} of these" if times > 1 else ""
    why = (
        f"the normalization batch of {count(len(few), 'layer')} is of "
        f"{count(round(least), 'sample')}{of_step}: statistics of so few vary from batch to batch, "
        "and test time has others"
    )
    sync = "SyncBN, or " if step.processes > processes else ""
    treatment = (
        f"{sync}more images a process, FrozenBN (bn_det.freeze), BRN or GN as NORM; accumulated "
        "gradients do not enlarge a normalization batch"
    )
    yield Finding("BN502", "warning", names, least, why, treatment)


def share_of_batch(layer: nn.Module, step: Step) -> float:
    """The samples of a layer's normalization batch in training, in those of one examined."""
    return step.share * (step.processes if is_synchronized(layer) else 1)


def is_synchronized(layer: nn.Module) -> bool:
    """Whether a layer normalizes over processes, whoever wrote it."""
    return getattr(layer, "group", None) is not None or "Sync" in type(layer).__name__


class Updates(NamedTuple):
    """Of a layer's EMA, in a step.

    Attributes:
        momentum: None for the mean of all batches.
        number: of updates.
        calls: in passes with gradients, but not those that a backward pass repeats.
        probes: calls in passes without gradients.
        passes: of the model, with gradients.
    """

    momentum: float | None
    number: int
    calls: int
    probes: int
    passes: int


def several_updates(layers: Mapping[str, Updates]) -> Finding | None:
    """BN503, of layers that have been updated several times in a step.

    Not of those that one pass calls several times (BN202), for that alone.
    """
    repeated = {n: of for n, of in layers.items() if of.number > of.calls + of.probes > 0}
    if repeated:
        what = "activation checkpointing has updated the EMA again, in each recomputation"
        return _several(repeated, "warning", what, MEND_REPEATED)
    probed = {n: of for n, of in layers.items() if of.probes and of.number > of.calls}
    if probed:
        what = "a forward pass without gradients, in training mode, which no step belongs to"
        return _several(probed, "warning", what, MEND_PROBED)
    accumulated = {n: of for n, of in layers.items() if of.passes > 1 and of.calls >= of.passes}
    if accumulated:
        passes = max(of.passes for of in accumulated.values())
        what = f"{passes} passes a step, each with a normalization batch of its own"
        mend = "none is needed where these are batches whose gradients are accumulated"
        return _several(accumulated, "note", what, mend)
    return None


def _several(found: Mapping[str, Updates], severity: str, what: str, mend: str) -> Finding:
    names = tuple(sorted(found, key=lambda name: -found[name].number))
    most = found[names[0]]
    why = f"{count(len(found), 'layer')} updated up to {most.number} times a step: {what}"
    if most.momentum:
        moves = 1 - (1 - most.momentum) ** most.number
        why += f"; an EMA of momentum {most.momentum:g} forgets, a step, as one of {moves:.2g}"
    return Finding("BN503", severity, names, most.number, why, mend)


def updates_without_step(extra: Mapping[str, int]) -> Finding:
    """BN503, of layers that have been updated between steps.

    Args:
        extra: updates of each.
    """
    names = tuple(sorted(extra, key=lambda name: -extra[name]))
    most = extra[names[0]]
    why = (
        f"{count(len(names), 'layer')} updated between steps, {names[0]} by {most} batches: passes "
        "in training mode that no step belongs to, as of an evaluation that wants losses"
    )
    return Finding("BN503", "warning", names, most, why, MEND_PROBED)


def modes_left(
    before: Mapping[str, str], now: Mapping[str, str], is_evaluated: bool
) -> Iterator[Finding]:
    """BN505.

    Args:
        before, now: of each layer, "moving" or, where it is in evaluation mode and not frozen,
            "still", in the steps of an earlier look, and of this one.
        is_evaluated: whether the model itself is in evaluation mode.
    """
    mend = (
        "model.train() after each evaluation; bn_det.freeze(model, NAMES) for what is to stay as "
        "it is, whatever train() and eval() say"
    )
    stopped = [n for n, mode in now.items() if mode == "still" and before.get(n) == "moving"]
    if stopped:
        what = "had moved before, and stand still: they are in evaluation mode, and not frozen"
        yield _left(stopped, what, mend)
    still = [name for name, mode in now.items() if mode == "still"]
    if not before and is_evaluated and still and "moving" not in now.values():
        yield _left(still, "stand still: the model is trained in evaluation mode", mend)
    begun = [n for n, mode in now.items() if mode == "moving" and before.get(n) == "still"]
    if begun:
        what = "had stood still, in evaluation mode, and move again: train() has undone that"
        yield _left(begun, what, mend)


def _left(names: Collection[str], what: str, mend: str) -> Finding:
    why = f"the statistics of {count(len(names), 'layer')} {what}"
    return Finding("BN505", "warning", tuple(names), len(names), why, mend)
