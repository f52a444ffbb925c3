"""What can be told of BatchNorm from a checkpoint alone."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..layers.folded import is_trained
from .checkpoint import Checkpoint, Layer, read
from .findings import Finding, Recompute, Report, check_rules, count, make_report
from .from_training import MEND_PROBED, MEND_REPEATED
from .prescriptions import untried
from .rules import RULES

FLOAT16 = torch.finfo(torch.float16)
MOMENTUM = 0.1
"""torch's default; a model has its own, and a file has none."""

OF_FILES = tuple(rule for rule in RULES if rule.startswith("BN1"))
"""What can be looked for in a file."""

EPS = 1e-5, 1e-3
"""The usual ones: torch's and Detectron2's, and that of TensorFlow and of many detectors."""

_LEAST_LEFT = 0.01
_MANY_WITH_BIAS = 0.9
_MANY_MIXED = 0.5
_OF_USUAL = 0.1

_FUNCTIONS = "--model MODULE:FUNCTION --data MODULE:FUNCTION --call MODULE:FUNCTION"
_ANY = f"--config-file CONFIG (or for any model {_FUNCTIONS})"
"""What the command needs beside a file that does not say what model it is of."""


def examine_file(
    path: str | os.PathLike,
    rules: Collection[str] = OF_FILES,
    part: str | None = None,
) -> Report:
    """Findings of a checkpoint, from which no model is made.

    Args:
        path: a file of torch.save with plain data, a .pkl of Detectron2, or safetensors.
        rules: ids of those that are to be looked for.
        part: the key under which the weights are; by default where they usually are.

    Raises:
        InputError: it has no weights, or only an unsafe load could read them.
    """
    check_rules(rules)
    # That others were not looked for is no news.
    wanted = {rule for rule in RULES if rule in rules or rule not in OF_FILES}
    checkpoint = read(path, part)
    # Of a config it is the model's.
    of_part = _ANY if part in (None, "model") else f"--part {shlex.quote(part)} {_FUNCTIONS}"
    recompute = suited(Recompute.by_command(path, of_part), checkpoint)
    findings = untried([*findings_of(checkpoint, recompute), *fused_file(checkpoint)], recompute)
    number = len(checkpoint.layers)
    others = checkpoint.others
    also = f"; the file has weights under {others}, too: --part" if others else ""
    healthy = (
        f"nothing is wrong with what the file says of its {number} BatchNorm layers; whether their "
        "statistics fit the weights is seen on images: bn-det doctor with --config-file, or with "
        f"--model and --data, or bn_det.examine(model, batches){also}"
    )
    return make_report(findings, wanted, healthy if number else "the file has no BatchNorm" + also)


def suited(recompute: Recompute, checkpoint: Checkpoint) -> Recompute:
    """As a checkpoint's statistics are recomputed: those of a new layer (BN101) look folded."""
    is_new = any(of.rule == "BN101" for of in initial_statistics(checkpoint, recompute))
    return recompute._replace(usual=recompute.initial) if is_new else recompute


def findings_of(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """By the rules of statistics, of a file or of a model's state.

    Args:
        recompute: how its statistics are recomputed.
    """
    for check in _CHECKS:
        yield from check(checkpoint, recompute)


_Check = Callable[[Checkpoint, Recompute], Iterator[Finding]]
_CHECKS: list[_Check] = []


def _check(function: _Check) -> _Check:
    _CHECKS.append(function)
    return function


def _named(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _is_initial(layer: Layer) -> bool:
    """Whether the statistics are those of a new layer."""
    # Detectron2's FrozenBatchNorm2d has 1 - eps. Half precision is finer than the tolerance.
    near = (layer.var.double() - 1).abs() <= 2 * max(EPS)
    return not layer.mean.any() and bool(near.all())


@_check
def initial_statistics(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN101 to BN105: by the counter, and by whether the affine is a new layer's."""
    groups: dict[str, list[Layer]] = {}
    for layer in filter(_is_initial, checkpoint.layers):
        is_new = not is_trained(layer)
        if layer.batches is None:
            rule = "BN102" if is_new else "BN103"
        elif layer.batches == 0:
            rule = "BN105" if is_new else "BN101"
        else:
            rule = "BN104"
        groups.setdefault(rule, []).append(layer)
    number = len(checkpoint.layers)
    for rule, layers in groups.items():
        words = f"{len(layers)} of {number} layers"
        severity, why, treatment = {
            "BN101": (
                "error",
                f"{words} hold mean 0, variance 1 and a counter of 0 under a trained weight and "
                "bias: averaged without buffers, left out where they were saved, or never in "
                "training mode",
                recompute.initial,
            ),
            "BN102": (
                "error",
                f"{words} are frozen at mean 0, variance 1, weight 1 and bias 0: the identity",
                "train with BN, SyncBN or GN in place of FrozenBN (MODEL.RESNETS.NORM), or start "
                "from weights that have statistics",
            ),
            "BN103": (
                "note",
                f"{words} have their statistics in weight and bias: right while they are frozen",
                "keep them frozen, or have real statistics before they train: bn_det.unfold(model, "
                "batches, allow_short=True)",
            ),
            "BN104": (
                "error",
                f"{words} have counted {max(of.batches or 0 for of in layers)} batches and hold "
                "mean 0 and variance 1: momentum 0, or buffers that were set back",
                f"set momentum 0.1 and train on, or {recompute.usual}",
            ),
            "BN105": (
                "warning",
                f"{words} are as new ones, with a counter of 0"
                + ("; nothing here is trained" if len(layers) == number else ""),
                f"if they are in use: {recompute.initial}",
            ),
        }[rule]
        yield Finding(rule, severity, _named(layers), len(layers), why, treatment)


@_check
def start_left(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN106."""
    young = {}
    for layer in checkpoint.layers:
        momentum = checkpoint.momenta.get(layer.name, MOMENTUM)
        left = left_of_start(momentum, layer.batches) if layer.batches else 0.0
        # Of momentum 0 all is left: what such a layer has it was given.
        if _LEAST_LEFT <= left < 1 and not _is_initial(layer):
            young[layer.name] = left, layer.batches, momentum
    if young:
        most, fewest, momentum = max(young.values())
        why = (
            f"{len(young)} of {len(checkpoint.layers)} layers have counted {fewest} batches or a "
            f"few more: with momentum {momentum:g} {100 * most:.0f} % of the start's mean 0 and "
            "variance 1 are in their statistics, unless these were recomputed since"
        )
        yield Finding("BN106", "warning", tuple(young), most, why, recompute.usual)


def left_of_start(momentum: float | None, batches: int) -> float:
    """The weight of what an EMA began at, after so many batches."""
    return (1 - momentum) ** batches if momentum is not None else float(batches == 0)


@_check
def of_channels(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN108, BN109 and BN111: by what channels there are."""
    for rule, (severity, of_layer, what, treatment) in _OF_CHANNELS.items():
        found = _with_channels(checkpoint, rule, severity, of_layer, what)
        if found is not None:
            yield found._replace(treatment=treatment or recompute.usual)


@_check
def not_finite(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN107."""
    found = _with_channels(checkpoint, "BN107", "error", _is_not_finite, "with NaN or infinity")
    if found is None:
        return
    affines = [[t for t in (of.weight, of.bias) if t is not None] for of in checkpoint.layers]
    if any(bool(_are_not_finite(*affine).any()) for affine in affines if affine):
        failed = "an earlier checkpoint: the training had failed, and weights are not measured anew"
        yield found._replace(treatment=failed)
    else:
        yield found._replace(treatment=recompute.usual)


@_check
def eps_decides(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN110; a warning in a model whose layers have a larger eps than any usual one."""
    what = f"with another output by another usual eps ({EPS[0]}, {EPS[1]})"
    found = _with_channels(checkpoint, "BN110", "note", _depends_on_eps, what)
    if found is None:
        return
    found = found._replace(treatment="give every layer the eps that the model was trained with")
    largest = max(of.eps or 0.0 for of in checkpoint.layers if of.name in found.where)
    if largest > EPS[1]:
        why = f"eps is {largest:g}, larger than usual ones; {found.why}"
        found = found._replace(severity="warning", why=why)
    yield found


def _with_channels(
    checkpoint: Checkpoint,
    rule: str,
    severity: str,
    of_layer: Callable[[Layer], Tensor],
    what: str,
) -> Finding | None:
    """Of the layers that have channels of a kind, with the first of these; untreated."""
    numbers = {}
    for layer in checkpoint.layers:
        channels = of_layer(layer).nonzero().flatten()
        if len(channels):
            numbers[layer.name] = len(channels), channels[:5].tolist()
    if not numbers:
        return None
    first = next(iter(numbers))
    number, shown_ones = numbers[first]
    some = ", ".join(map(str, shown_ones)) + ", ..." * (number > 5)
    total = sum(number for number, _ in numbers.values())
    places = f"{count(total, 'channel')} in {count(len(numbers), 'layer')}"
    return Finding(
        rule, severity, tuple(numbers), total, f"{places} {what}; {first}: channel {some}", ""
    )


def _is_not_finite(layer: Layer) -> Tensor:
    return _are_not_finite(layer.mean, layer.var, layer.weight, layer.bias)


def _are_not_finite(*values: Tensor | None) -> Tensor:
    return ~torch.stack([t.double() for t in values if t is not None]).isfinite().all(0)


def _is_clamped(layer: Layer) -> Tensor:
    values = torch.stack([layer.mean.abs(), layer.var]).double()
    return (values == FLOAT16.max).any(0)


def _depends_on_eps(layer: Layer) -> Tensor:
    """Channels whose output varies otherwise, by a tenth of what is usual in the layer."""
    var = layer.var.double().clamp(min=0)
    scale = torch.ones_like(var) if layer.weight is None else layer.weight.double().abs()
    stds = [scale * (var / (var + eps)).sqrt() for eps in (EPS[0], max(EPS[1], layer.eps or 0.0))]
    usual = stds[0].median() if len(var) else 0.0
    return stds[0] - stds[1] > _OF_USUAL * usual


def _is_dead(layer: Layer) -> Tensor:
    without_weight = layer.var == 0
    if layer.weight is None or not is_trained(layer):
        return without_weight
    return without_weight | (layer.weight == 0)


_OF_CHANNELS: dict[str, tuple[str, Callable[[Layer], Tensor], str, str]] = {
    "BN108": ("error", lambda layer: layer.var < 0, "with a variance below 0", ""),
    "BN109": (
        "error",
        _is_clamped,
        "with a mean or variance at float16's largest number",
        "",
    ),
    "BN111": (
        "note",
        _is_dead,
        "with the same output for every image",
        "none is needed; they can be pruned",
    ),
}
"""Severity, which channels of a layer, what they are, and the treatment if not to recompute."""


@_check
def half_precision(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN115."""
    layers = [of for of in checkpoint.layers if of.var.dtype in (torch.float16, torch.bfloat16)]
    if layers:
        # Of bfloat16, which has float32's exponents, none is.
        lost = sum(int((of.var.abs() < torch.finfo(of.var.dtype).tiny).sum()) for of in layers)
        why = (
            f"{len(layers)} of {len(checkpoint.layers)} layers have statistics of "
            f"{str(layers[0].var.dtype).removeprefix('torch.')}; {lost} channels have a variance "
            "below the least that it has in full precision"
        )
        treatment = "save statistics in float32: model.half() only for inference"
        yield Finding("BN115", "note", _named(layers), lost, why, treatment)


_MOST_TIMES = 16


@_check
def counters(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN112."""
    counted = [(layer.batches, layer) for layer in checkpoint.layers if layer.batches]
    if not counted:
        return
    (usual, _), *_ = Counter(batches for batches, _ in counted).most_common(1)
    groups: dict[int, list[Layer]] = {}
    for batches, layer in counted:
        times, rest = divmod(batches, usual)
        if usual > 1 and ((rest == 0 and 1 < times <= _MOST_TIMES) or (times, rest) == (1, 1)):
            groups.setdefault(batches, []).append(layer)
    for batches, layers in groups.items():
        ratio = batches / usual
        what = "one more than" if batches == usual + 1 else f"{ratio:g} times"
        meaning = {
            1: "a forward pass in training mode that belongs to no step",
            2: "activation checkpointing that updates the EMA again, or two calls a pass",
        }.get(batches // usual, "as many calls a pass: a layer that levels share")
        why = (
            f"{count(len(layers), 'layer')} counted {batches} batches, {what} the {usual} of most: "
            f"{meaning}"
        )
        treatment = (
            "statistics for each level, in place of shared ones: bn_det.DomainBatchNorm2d, called "
            "with all levels (bn_det.forward_levels)"
        )
        if ratio <= 2:
            treatment = f"{MEND_PROBED}; {MEND_REPEATED}"
        yield Finding("BN112", "warning", _named(layers), ratio, why, treatment)


@_check
def missing_keys(checkpoint: Checkpoint, recompute: Recompute) -> Iterator[Finding]:
    """BN113."""
    if checkpoint.broken:
        key, what = next(iter(checkpoint.broken.items()))
        why = f"{count(len(checkpoint.broken), 'key')} without a layer, first {key}, which {what}"
        names = tuple(name.rpartition(".")[0] for name in checkpoint.broken)
        yield Finding("BN113", "error", names, len(checkpoint.broken), why, recompute.usual)


def fused_file(checkpoint: Checkpoint) -> Iterator[Finding]:
    """BN114; of a model it is known what it has."""
    convs, number = checkpoint.convs, len(checkpoint.layers)
    if checkpoint.broken or len(convs) < 2:
        return
    with_bias = [name for name, has_bias in convs.items() if has_bias]
    least, most = _MANY_WITH_BIAS * len(convs), (1 - _MANY_WITH_BIAS) * len(convs)
    if len(with_bias) >= least and number <= most:
        why = (
            f"it has {f'{number} BatchNorm' if number else 'no statistics'}, and {len(with_bias)} "
            f"of {len(convs)} convolutions have a bias: if the model has BatchNorm, this is its "
            "fused file"
        )
    elif with_bias := _fused_beside_others(convs) if number else []:
        why = (
            f"{count(len(with_bias), 'convolution')} have a bias, and others of the same name in "
            f"other blocks have BatchNorm in its place, first {with_bias[0]}: fused in part"
        )
    else:
        return
    treatment = "fuse the model, too, before it is loaded (bn_det.fuse), or load the unfused file"
    yield Finding("BN114", "warning", (), len(with_bias), why, treatment)


def _fused_beside_others(convs: Mapping[str, bool]) -> list[str]:
    """Those with a bias in places where others have none, in a file where that is usual.

    A place is the name but for the numbers of the blocks that it is in. That a few places have both
    is seen in unfused models, too.
    """
    places: dict[str, list[str]] = {}
    for name in convs:
        block, dot, own = name.rpartition(".")
        places.setdefault(re.sub(r"\d+", "#", block) + dot + own, []).append(name)
    with_norm = [
        names for names in places.values() if len(names) > 1 and not all(map(convs.get, names))
    ]
    mixed = [names for names in with_norm if any(map(convs.get, names))]
    if len(mixed) < _MANY_MIXED * len(with_norm):
        return []
    return [name for names in mixed for name in names if convs[name]]
