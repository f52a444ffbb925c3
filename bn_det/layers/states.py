"""What every BatchNorm of a model does as it stands: a table of the true states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import first_of
from .batch_norm import BatchNorm2d
from .become import class_of
from .comm import process_group
from .domain_batch_norm import DomainBatchNorm2d, state_holders
from .ema import tracks
from .folded import is_folded
from .freeze import affines_of, is_frozen, learns
from .frozen import FrozenBatchNorm, StaysInEvaluation
from .kept import kept_in_evaluation
from .kinds import STATE, lists_with_affine, selected, unwrapped, why_lazy
from .types import AnyBatchNorm, WithAffine, has_statistics


class LayerState(NamedTuple):
    """Of one BatchNorm.

    Attributes:
        name: of the module.
        kind: its class, whose it is unless it is torch's, and what it was before it was frozen.
        mode: "training" or "evaluation", as its flag says.
        normalizes: what does, in this mode: "batch", "batch, renormalized" or "population".
        statistics: "moving", where a call updates them; "frozen", where none ever does; "kept",
            where none does in this mode or by this setting; or "none".
        affine: "learns", "fixed" (needs no gradient), "in part", "constant" (buffers) or "none".
        batch: the normalization batch of training: "process", "N processes", "N samples"; and with
            several domains which of them are together.
        momentum: the weight of a new batch in the EMA; None for the mean of all.
        batches: how many have been tracked; None where nothing counts.
        folded: whether statistics seem to be folded into weight and bias.
        contradictions: what is likely not meant, in words.
    """

    name: str
    kind: str
    mode: str
    normalizes: str
    statistics: str
    affine: str
    batch: str
    momentum: float | None
    batches: int | None
    folded: bool
    contradictions: tuple[str, ...]


class States(NamedTuple):
    """Prints as a table, in which sub-trees whose layers are all alike are one line.

    Attributes:
        layers: every BatchNorm that is called, in the model's order.
    """

    layers: list[LayerState]

    @property
    def contradictions(self) -> dict[str, tuple[str, ...]]:
        """By the names of layers that have some."""
        return {of.name: of.contradictions for of in self.layers if of.contradictions}

    def __str__(self) -> str:
        from tabulate import tabulate  # not before it is read: the layers need torch alone

        if not self.layers:
            return "no BatchNorm"
        rows = [_row(label, of) for label, of in _by_subtree(self.layers)]
        headers = (
            *("layers", "kind", "mode", "normalizes", "statistics", "affine"),
            *("batch", "EMA", "!"),
        )
        table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        words = sorted({words for of in self.layers for words in of.contradictions})
        notes = [f"! {_count(self.layers, of_words)}: {of_words}" for of_words in words]
        return "\n".join([table, *notes])


def states(model: nn.Module, modules: str | Iterable[str] | None = None) -> States:
    """The true state of every BatchNorm of a model, whoever wrote it.

    What is frozen, learned and synchronized is decided by flags of modules, parameters and layers
    that can contradict each other; this is what follows from all of them. Nothing is changed.

        print(bn_det.states(model))

    Args:
        modules: names of modules or patterns of names, as in :func:`bn_det.freeze`; None for all.

    Raises:
        InputError: ``modules`` names nothing.
    """
    model = unwrapped(model)
    layers = selected("states", model, modules)
    in_training = {m for around in model.modules() if around.training for m in around.modules()}
    undone = in_training - kept_in_evaluation(model)
    lists, affines = lists_with_affine(model), affines_of(model, layers)
    return States(
        [
            _state(layer, name, affines[layer], lists.get(layer), layer in undone)
            for layer, name in layers.items()
        ]
    )


def _state(
    layer: AnyBatchNorm,
    name: str,
    affine: Sequence[nn.Parameter],
    in_list: WithAffine | None,
    is_undone: bool,
) -> LayerState:
    """Of one layer.

    Args:
        affine: its parameters, or those that its parent has for it.
        in_list: that parent, as :func:`lists_with_affine` has it.
        is_undone: whether evaluation mode, if it is in that, would be undone by train().
    """
    kind = _kind(class_of(layer))
    if isinstance(layer, FrozenBatchNorm):
        kind += f" (was {_kind(layer.thawed_type)})"
    elif isinstance(layer, StaysInEvaluation):
        kind = f"{_kind(layer.thawed_type)} (frozen)"
    if why := why_lazy(layer):
        mode = "training" if layer.training else "evaluation"
        return LayerState(name, kind, mode, "-", "-", "-", "-", None, None, False, (why,))
    population = state_holders(layer)[0][0]
    counter = getattr(population, "num_batches_tracked", None)
    state = LayerState(
        name=name,
        kind=kind,
        mode="training" if layer.training else "evaluation",
        normalizes=_normalizes(layer),
        statistics=_statistics(layer),
        affine=_affine(layer, affine),
        batch=_batch(layer),
        momentum=getattr(layer, "momentum", None),
        batches=None if counter is None or counter.is_meta else int(counter),
        folded=is_folded(layer, in_list),
        contradictions=(),
    )
    return state._replace(contradictions=tuple(_contradictions(state, layer, is_undone)))


def _kind(cls: type[nn.Module]) -> str:
    """A class, and whose it is where it is not torch's."""
    whose = cls.__module__.partition(".")[0]
    return cls.__name__ if whose == "torch" else f"{whose}.{cls.__name__}"


def _normalizes(layer: AnyBatchNorm) -> str:
    if is_frozen(layer):
        return "population"
    population = state_holders(layer)[0][0]
    by_default = "batch" if layer.training else "population"
    if isinstance(layer, BatchNorm2d):
        by_default = layer.train_statistics if layer.training else layer.eval_statistics
    if by_default == "batch" and layer.training and getattr(layer, "renorm", None) is not None:
        return "batch, renormalized"
    return by_default if has_statistics(population) else "batch"


def _statistics(layer: AnyBatchNorm) -> str:
    populations = {population for population, _ in state_holders(layer)}
    if not all(map(has_statistics, populations)):
        return "none"
    if is_frozen(layer):
        return "frozen"
    return "moving" if layer.training and any(map(tracks, populations)) else "kept"


def _affine(layer: AnyBatchNorm, affine: Sequence[nn.Parameter]) -> str:
    needs = set(map(learns, affine))
    if not needs:
        holders = {affine for _, affine in state_holders(layer)}
        return "none" if all(affine.weight is None for affine in holders) else "constant"
    return "in part" if len(needs) > 1 else "learns" if needs.pop() else "fixed"


def _batch(layer: nn.Module) -> str:
    if is_frozen(layer):
        return "-"
    group = getattr(layer, "group", None)
    if isinstance(layer, nn.SyncBatchNorm):
        group = layer.process_group or "world"
    batch = "process"
    if getattr(layer, "ghost_size", None) is not None:
        batch = f"{layer.ghost_size} samples"
    elif group is not None:
        ranks = process_group(group)
        batch = f"{ranks.size() if ranks else 1} processes"
    if isinstance(layer, DomainBatchNorm2d):
        together = "together" if layer.statistics == "shared" else "each"
        batch += f", {layer.num_domains} domains {together}"
    return batch


def _contradictions(state: LayerState, layer: AnyBatchNorm, is_undone: bool) -> Iterator[str]:
    if state.affine == "fixed" and state.statistics == "moving":
        yield "the affine is fixed, and the statistics are still moving"
    if state.folded and state.affine in ("learns", "in part") and state.normalizes == "population":
        yield "statistics are folded into an affine that learns otherwise than before folding"
    if state.folded and state.normalizes.startswith("batch"):
        yield "statistics are folded into the affine, and the batch normalizes"
    if is_undone and not layer.training and not is_frozen(layer):
        yield "in evaluation mode in a module in training mode: the next train() undoes it"
    if state.mode == "evaluation" and state.normalizes == "batch":
        yield "the batch normalizes in evaluation"
    if state.statistics == "moving" and state.momentum == 0:
        yield "momentum 0: calls are counted, and the statistics never move"
    names = sorted(
        name
        for pair in state_holders(layer)
        for holder in dict.fromkeys(pair)
        for name in STATE
        if (value := getattr(holder, name)) is not None
        and not (value.is_meta or value.isfinite().all())
    )
    if names:
        yield f"{', '.join(dict.fromkeys(names))} not finite"


def _row(label: str, of: LayerState) -> list[Any]:
    ema = "-"
    if of.statistics in ("moving", "kept") and of.batches is not None:
        weight = "mean of all" if of.momentum is None else f"{of.momentum:g}"
        ema = f"{weight}, {of.batches} batches"
    statistics = f"{of.statistics}, folded" if of.folded else of.statistics
    mark = "!" if of.contradictions else ""
    return [label, of.kind, of.mode, of.normalizes, statistics, of.affine, of.batch, ema, mark]


def _count(layers: list[LayerState], words: str) -> str:
    names = [of.name or "the module" for of in layers if words in of.contradictions]
    return first_of(names)


def _by_subtree(layers: list[LayerState]) -> list[tuple[str, LayerState]]:
    """Lines of a table: the largest sub-trees whose layers do not differ but by name."""
    return list(_lines(layers, 0))


def _lines(layers: list[LayerState], depth: int) -> Iterator[tuple[str, LayerState]]:
    """Of layers that have the first parts of their names in common, that many."""
    if len({of._replace(name="") for of in layers}) == 1:
        first = layers[0]
        prefix = ".".join(_parts(first)[:depth])
        many = f"{prefix} ({len(layers)})" if prefix else f"all ({len(layers)})"
        yield (many if len(layers) > 1 else first.name), first
        return
    groups: dict[str, list[LayerState]] = {}
    for of in layers:
        part = _parts(of)[depth] if depth < len(_parts(of)) else ""
        groups.setdefault(part, []).append(of)
    for group in groups.values():
        yield from _lines(group, depth + 1)


def _parts(of: LayerState) -> list[str]:
    return of.name.split(".")
