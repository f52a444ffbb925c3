"""What can be told of a model's BatchNorm from its modules, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import shown
from ..layers.freeze import learns
from ..layers.kinds import batch_norms, eps_of, unwrapped, why_lazy
from ..layers.states import LayerState, states
from .findings import Finding, Recompute, count

_DECAY = 0.5
"""A momentum from which on it is rather the decay of another framework, of which 0.9 is usual."""


def findings_of(model: nn.Module, recompute: Recompute) -> Iterator[Finding]:
    """By all rules of modules; the mode that the model is in counts.

    Args:
        recompute: how its statistics are recomputed.
    """
    layers = states(model).layers
    yield from _moving(model, layers)
    yield from _undone(layers)
    yield from _momentum(layers, recompute)
    yield from _mixed(model, layers)


def momenta(model: nn.Module) -> dict[str, float | None]:
    """Of what has an EMA, by name; 1 for what is no weight, as nothing can be told by it."""
    return {
        shown(name): as_weight(module.momentum)
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
    }


def as_weight(momentum: float | None) -> float | None:
    """The weight of a new batch in an EMA; 1 for what is none."""
    return momentum if momentum is None or 0 <= momentum <= 1 else 1.0


def _finding(
    rule: str, severity: str, layers: Sequence[LayerState], why: str, treatment: str
) -> Finding:
    names = tuple(of.name for of in layers)
    why = f"{count(len(layers), 'layer')}: {why}"
    return Finding(rule, severity, names, len(layers), why, treatment)


def _moving(model: nn.Module, layers: Sequence[LayerState]) -> Iterator[Finding]:
    """BN401."""
    model = unwrapped(model)
    found = [of for of in layers if of.statistics == "moving" and _is_fixed(model, of)]
    if found:
        yield _finding(
            "BN401", "warning", found,
            "weights, around them or their own, need no gradient, and each batch of training moves "
            "the statistics",
            "bn_det.freeze(model, NAMES), which holds both, through train() and copies",
        )  # fmt: skip


def _is_fixed(model: nn.Module, layer: LayerState) -> bool:
    """Whether an affine does not train; where there is none, the part that the layer is in."""
    if layer.affine not in ("none", "constant"):
        return layer.affine == "fixed"
    name = layer.name
    while name:
        name = name.rpartition(".")[0]
        around = list(model.get_submodule(name).parameters())
        if around:
            return not any(map(learns, around))
    return False


def _undone(layers: Sequence[LayerState]) -> Iterator[Finding]:
    """BN402."""
    found = [of for of in layers if any("train() undoes" in words for words in of.contradictions)]
    if found:
        yield _finding(
            "BN402", "warning", found,
            "in evaluation mode in a module in training mode, whose next train() undoes it",
            "bn_det.freeze(model, NAMES) if they are to stay so, or model.train()",
        )  # fmt: skip


def _momentum(layers: Sequence[LayerState], recompute: Recompute) -> Iterator[Finding]:
    """BN403."""
    of_emas = [of for of in layers if of.statistics in ("moving", "kept")]
    moving = [(of.momentum, of) for of in of_emas if of.momentum is not None]
    for found, what in (
        ([of for m, of in moving if _DECAY <= m <= 1], "is it a decay, 1 - momentum?"),
        ([of for m, of in moving if m == 0], "the statistics never move"),
        ([of for m, of in moving if not 0 <= m <= 1], "no weight of a mean, 0 to 1"),
    ):
        if found:
            yield _finding(
                "BN403", "warning", found, f"momentum {found[0].momentum:g}: {what}",
                "momentum 0.1, torch's default, is the weight of a new batch (decay 0.9): for what "
                f"is trained on; what the statistics are now is mended by {recompute.usual}",
            )  # fmt: skip


def _mixed(model: nn.Module, layers: Sequence[LayerState]) -> Iterator[Finding]:
    """BN404 and BN405."""
    modules = {name: layer for layer, name in batch_norms(model).items() if not why_lazy(layer)}
    of_eps = {name: eps_of(layer) for name, layer in modules.items()}
    of_momenta = {of.name: of.momentum for of in layers if of.batches is not None}
    for rule, key, values, treatment in (
        ("BN404", "eps", of_eps, "give every layer the eps that it was trained with"),
        ("BN405", "momentum", of_momenta, "check that the parts come from where these are right"),
    ):
        numbers: Counter[Any] = Counter(values.values())
        if len(numbers) > 1:
            (usual, _), *_ = numbers.most_common(1)
            names = {name for name, value in values.items() if value != usual}
            found = [of for of in layers if of.name in names]
            others = ", ".join(f"{value:g}" for value in numbers if value not in (usual, None))
            yield _finding(
                rule, "note", found, f"another {key} ({others}) than most have ({usual})", treatment
            )
