"""What may mend a model, and how it is done, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn

from ..errors import InputError, shown
from ..layers.convert import convert_batchnorm
from ..layers.domain_batch_norm import DomainBatchNorm2d
from ..layers.kinds import batch_norms, eps_of
from ..layers.types import WithStatistics
from ..population.observation import places_with_statistics
from ..population.snapshot import Snapshot
from ..population.update import update_bn_stats
from .findings import Finding, Recompute
from .from_file import EPS, left_of_start
from .from_passes import Seen
from .losses import Values, put, statistics_of
from .modes import in_mode
from .prescriptions import (
    FROZEN,
    LARGER_EPS,
    PER_LEVEL,
    PER_LEVEL_AND_FROZEN,
    RECOMPUTED,
    SMALLER_EPS,
    UNBIASED,
    Kind,
)


class Treatment(NamedTuple):
    """Attributes:
    kind: one of KINDS.
    apply: to a model, in place.
    stays: whether a model, and its checkpoint, can be left with it.
    needs: what a checkpoint with it needs beside it, if anything.
    """

    kind: Kind
    apply: Callable[[nn.Module], None]
    stays: bool = True
    needs: str = ""


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was before the block, whatever is converted in it."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


class Passes(NamedTuple):
    """How a model is run again on the batches of the passes.

    Attributes:
        call: None for the model's own.
        batches: gives those batches.
    """

    call: Callable[[nn.Module, Any], Any] | None
    batches: Callable[[], Iterable[Any]]
    num_iters: int
    progress: str | None


def treatments(
    model: nn.Module,
    seen: Seen,
    findings: Sequence[Finding],
    passes: Passes,
    recompute: Recompute,
) -> tuple[list[Treatment], dict[Kind, str]]:
    """Those that are to be tried: recomputed statistics, and what findings prescribe.

    Returns:
        also the kinds that cannot be tried, and why.
    """
    of_rules = {of.rule: of for of in findings}
    found, failed = [Treatment(RECOMPUTED, lambda model: put(model, seen.statistics))], {}
    for kind, make in (
        (PER_LEVEL, lambda: _per_level(model, seen, of_rules["BN202"], recompute)),
        (FROZEN, lambda: _with_frozen(model, passes)),
        (PER_LEVEL_AND_FROZEN, lambda: _both(model, seen, of_rules, passes, recompute)),
        (UNBIASED, lambda: _unbiased(model, of_rules["BN106"])),
        (LARGER_EPS, lambda: _larger_eps(model)),
        (SMALLER_EPS, lambda: _smaller_eps(model)),
    ):
        if of_rules.keys().isdisjoint(kind.rules):
            continue
        try:
            treatment = make()
        except InputError as e:
            failed[kind] = f"it could not be tried: {e}"
        else:
            found += [treatment] if treatment else []
    return found, failed


def _per_level(model: nn.Module, seen: Seen, finding: Finding, recompute: Recompute) -> Treatment:
    """All recomputed; of layers that levels share for each level.

    A layer for lists of levels has a place for these, and all of them get some, as a config says it
    of a whole head. One that is called level by level has none: what it would gain is tried alone.
    """
    of_lists = _sharing(model, seen)
    layers = {name: layer for layer, name in batch_norms(model).items()}
    of_calls = [name for name in finding.where if name not in of_lists]

    def apply(model: nn.Module) -> None:
        put(model, seen.statistics)
        for name in of_calls:
            _level_by_level(layers[name], seen.by_level[name])
        _give_own(model, of_lists)
        own = {f"{name}.{k}": of for name in of_lists for k, of in enumerate(seen.by_level[name])}
        put(model, own)

    needs = recompute.needs
    if of_calls:
        needs = "the model has no place for it: call a bn_det.DomainBatchNorm2d with all levels"
    return Treatment(PER_LEVEL, apply, not of_calls, needs)


def _both(
    model: nn.Module,
    seen: Seen,
    of_rules: Mapping[str, Finding],
    passes: Passes,
    recompute: Recompute,
) -> Treatment | None:
    """All recomputed, of frozen layers, too, where levels have statistics of their own.

    None unless both are found wrong, and where a layer has no place for these.
    """
    if not of_rules.keys() >= set(PER_LEVEL_AND_FROZEN.rules):
        return None
    of_lists = _sharing(model, seen)
    if not of_lists.keys() >= set(of_rules["BN202"].where):
        return None
    statistics = _recomputed_with_frozen(model, passes, of_lists)

    def apply(model: nn.Module) -> None:
        _give_own(model, of_lists)
        put(model, statistics)

    return Treatment(PER_LEVEL_AND_FROZEN, apply, needs=recompute.needs)


def _sharing(model: nn.Module, seen: Seen) -> dict[str, DomainBatchNorm2d]:
    """The layers for lists of levels that have one set of population statistics for all, by name.

    Raises:
        InputError: there is no such set for each level of one.
    """
    layers = {name: layer for layer, name in batch_norms(model).items()}
    of_lists = {name: layer for name, layer in layers.items() if shares_population(layer)}
    for name, layer in of_lists.items():
        if len(seen.by_level.get(name, ())) != layer.num_domains:
            raise InputError(f"{name}: it does not see each of its levels once a pass")
    return of_lists


def _give_own(model: nn.Module, layers: Mapping[str, DomainBatchNorm2d]) -> None:
    """Have layers have population statistics for each level, by name."""
    for name, layer in layers.items():
        convert_batchnorm(model, partial(_with_own, layer), name)


def shares_population(layer: nn.Module) -> TypeGuard[DomainBatchNorm2d]:
    """Whether a layer normalizes levels each by itself, and all by the same statistics at test."""
    if not (isinstance(layer, DomainBatchNorm2d) and layer.takes_list):
        return False
    return (layer.statistics, layer.population) == ("per_domain", "shared")


_CHOICES = (
    *("group", "timeout", "ghost_size", "ghost_order", "eval_statistics", "train_statistics"),
    *("update_population", "renorm"),
)


def _with_own(layer: DomainBatchNorm2d, num_features: int) -> DomainBatchNorm2d:
    """A new layer like another one, with population statistics for each domain."""
    choices = {name: getattr(layer, name) for name in _CHOICES}
    return DomainBatchNorm2d(
        num_features,
        layer.num_domains,
        statistics=layer.statistics,
        population="per_domain",
        affine=layer.affine_sharing,
        **choices,
    )


def _level_by_level(layer: nn.Module, by_level: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Have a layer that is called once a level, in their order, have the statistics of each."""
    calls = cycle(by_level)

    def before(layer: WithStatistics, inputs: object) -> None:
        for buffer, value in zip((layer.running_mean, layer.running_var), next(calls), strict=True):
            buffer.copy_(value)

    layer.register_forward_pre_hook(before)


def _with_frozen(model: nn.Module, passes: Passes) -> Treatment:
    """All recomputed, in passes in which frozen layers normalize by their batch."""
    statistics = _recomputed_with_frozen(model, passes, {})
    return Treatment(FROZEN, lambda model: put(model, statistics))


def _recomputed_with_frozen(
    model: nn.Module, passes: Passes, of_lists: Mapping[str, DomainBatchNorm2d]
) -> Values:
    """The statistics of all layers; the model is left as it was.

    Args:
        of_lists: layers that have statistics for each level in these passes.
    """
    with put_back(model), in_mode(model, training=True):
        _give_own(model, of_lists)
        update_bn_stats(
            model,
            passes.batches(),
            passes.num_iters,
            passes.progress,
            allow_short=True,
            call=passes.call,
            group=None,
            frozen=True,
        )
        return statistics_of(model)


def _unbiased(model: nn.Module, finding: Finding) -> Treatment | None:
    """Statistics without the mean 0 and the variance 1 that an EMA begins at.

    After n batches these weigh (1 - m)^n in it: exactly, if the layer has begun at them, and all
    batches have been counted.
    """
    values: Values = {}
    for place in places_with_statistics(model):
        layer = place.module
        counter = getattr(layer, "num_batches_tracked", None)
        if shown(place.name) in finding.where and counter is not None:
            left = left_of_start(getattr(layer, "momentum", None), int(counter))
            mean, var = layer.running_mean.double(), layer.running_var.double()
            values[place.name] = mean / (1 - left), (var - left) / (1 - left)
    if any(bool((var < 0).any()) for _, var in values.values()):
        raise InputError(
            "variances would be negative without the start's value: they have not begun at 1, or "
            "not all batches were counted"
        )
    return Treatment(UNBIASED, lambda model: put(model, values)) if values else None


def _larger_eps(model: nn.Module) -> Treatment | None:
    """The larger usual eps, in layers of a smaller one.

    What it adds is put into the variances, which a file has: the same function in evaluation.
    """
    values = _with_eps(model, EPS[1], lambda more: more > 0)
    needs = (
        f"before it trains on, give its layers eps {EPS[1]:g}, and take what that adds from the "
        "variances again"
    )
    return Treatment(LARGER_EPS, lambda model: put(model, values), needs=needs) if values else None


def _smaller_eps(model: nn.Module) -> Treatment | None:
    """The smaller usual eps, in layers of a larger one.

    It is tried by the variances, too. Small ones are negative then, which no file should have.
    """
    values = _with_eps(model, EPS[0], lambda more: more < 0)
    needs = f"give its layers eps {EPS[0]:g}, where the model is made"
    if not values:
        return None
    return Treatment(SMALLER_EPS, lambda model: put(model, values), stays=False, needs=needs)


def _with_eps(model: nn.Module, eps: float, is_meant: Callable[[float], bool]) -> Values:
    """The statistics by which layers compute what they would with another eps.

    Args:
        is_meant: whether layers are, by what it is more than theirs.
    """
    return {
        place.name: (place.module.running_mean.clone(), place.module.running_var + more)
        for place in places_with_statistics(model)
        if is_meant(more := eps - eps_of(place.owner))
    }
