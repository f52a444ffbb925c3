"""What can be told of a model's BatchNorm from passes over images, of which nothing is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers.comm import Group, process_group
from ..layers.freeze import is_frozen
from ..layers.moments import Moments
from ..layers.types import WithStatistics
from ..population.estimate import Estimate
from ..population.observation import PopulationLayer, population_layers
from ..population.report import LayerReport, shift_of
from ..population.update import How, measure_statistics
from .calls import CallObserver, SourceShare, of_each
from .chance import FALSE_ALARMS, bound_of
from .findings import COSTS, IN_CODE, Finding, Measures, Recompute, count, furthest
from .from_model import as_weight
from .from_training import Step, share_of_batch
from .losses import Values
from .modes import as_called, in_mode
from .shares import Share, share_of

USUAL = 8
"""Batches from which on chance, of few degrees of freedom, hides no gross fault."""


class Seen(NamedTuple):
    """What the layers have seen.

    Attributes:
        num_batches: of all ranks.
        layers: measures of those that are not frozen, in the order in which they are called.
        shares: of layers that have several normalization batches a pass, and share statistics.
        by_level: of these, mean and variance of all values of each such batch, in their order.
        sources: of layers whose images are of several sources that share statistics.
        estimates: of all layers in that order, the frozen among them where these were looked at.
        frozen: names of those.
        called: the layer of each place of statistics, and the samples of a call, on average.
    """

    num_batches: int
    layers: list[Measures]
    shares: dict[str, Share]
    by_level: dict[str, list[tuple[Tensor, Tensor]]]
    sources: dict[str, SourceShare]
    estimates: dict[str, Estimate]
    frozen: set[str]
    called: dict[str, tuple[nn.Module, float]]

    @property
    def statistics(self) -> Values:
        """Mean and variance of all values that each layer that is not frozen has seen."""
        return {
            name: (of.mean, of.population_var)
            for name, of in self.estimates.items()
            if name not in self.frozen
        }


def look(
    model: nn.Module,
    batches: Iterable[Any],
    num_iters: int,
    call: Callable[[nn.Module, Any], Any] | None,
    group: Group,
    progress: str | None,
    frozen: bool,
    step: Step,
) -> Seen:
    """Run a model in training mode on batches, and leave it as it was.

    Args:
        frozen: whether frozen layers are looked at, too, which normalize as they do in training.
        step: of the training.

    Raises:
        InputError: as :func:`bn_det.update_bn_stats`; there are fewer than two batches.
    """
    with in_mode(model, training=True):
        # Statistics of frozen ones are constants that the weights have been trained with.
        layers = population_layers(model, frozen)
        observer = CallObserver(as_called(model, call), model, layers)
        # What an EMA estimates is the mean of the batches' variances.
        how = How(num_iters, "mean_of_batch_variances", 0.0, True, process_group(group), "batches")
        found, report = measure_statistics(observer, batches, how, progress)
        if layers and not report.layers:
            raise InputError("batches: no batch has a value for any of the layers; all are empty")
        if report.layers and report.num_batches < 2:
            raise InputError(
                f"batches: one is too few to tell chance from a fault; use {USUAL} or more"
            )
    is_frozen_by = {layer.name: is_frozen(layer.owner) for layer in layers}
    momenta = {of.name: as_weight(getattr(of.module, "momentum", None)) for of in layers}
    depth = {name: k for k, name in enumerate(observer.by_first_call())}
    moving = sorted(
        (of for of in report.layers if not is_frozen_by[of.name]), key=lambda of: depth[of.name]
    )
    fewest = min((of.num_batches for of in moving), default=0)
    bound = bound_of(fewest, 2 * max(len(moving), 1))
    by_level = observer.levels()
    by_name = {layer.name: layer for layer in layers}
    owners = {of.name: by_name[of.name].owner for of in moving}
    emas = {name: _Ema(momenta[name], share_of_batch(of, step)) for name, of in owners.items()}
    offs = {
        of.name: _off_in_turn(by_name[of.name].module, by_level[of.name], emas[of.name])
        if of.name in by_level
        else _off(of, emas[of.name])
        for of in moving
    }
    shares = {name: share_of(passes) for name, passes in by_level.items()}
    pairs = zip(layers, found, strict=True)
    estimates = {layer.name: of for layer, of in pairs if of is not None}
    return Seen(
        report.num_batches,
        [_measures(of, offs[of.name], bound, observer, shares) for of in moving],
        shares,
        {name: of_each(passes) for name, passes in by_level.items()},
        observer.shares_of_sources(),
        {name: estimates[name] for name in depth if name in estimates},
        {name for name, is_one in is_frozen_by.items() if is_one},
        {of.name: _called(of, by_name[of.name], observer) for of in moving},
    )


def _called(
    of: LayerReport, layer: PopulationLayer, observer: CallObserver
) -> tuple[nn.Module, float]:
    return layer.owner, of.num_samples / of.num_batches / observer.parts_a_pass(layer)


class _Off(NamedTuple):
    """How far an EMA is from what it estimates, and by how much it may be by chance."""

    mean_shift: float
    var_shift: float
    mean_chance: float
    var_chance: float


def _measures(
    of: LayerReport,
    off: _Off,
    bound: float,
    observer: CallObserver,
    shares: Mapping[str, Share],
) -> Measures:
    share = shares.get(of.name)
    return Measures(
        of.name,
        *off,
        bound,
        noise=observer.noise(of),
        calls=observer.calls(of.name),
        share=None if share is None else share.share,
    )


class _Ema(NamedTuple):
    """Attributes:
    momentum: None for the mean of all batches.
    share: the samples of a normalization batch of the training, in those of one of the passes.
    """

    momentum: float | None
    share: float

    def noise(self, momentum: float) -> float:
        """Its variance about what it estimates, in that of the statistics of a batch of the passes.

        It has m / (2 - m) of the variance of those of its own batches, which goes as one over their
        samples. That larger batches vary less is not counted on.
        """
        return momentum / (2 - momentum) / min(self.share, 1)


def _off(of: LayerReport, ema: _Ema) -> _Off:
    chances = [_chance(of, error, ema) for error in (of.mean_error, of.var_error)]
    return _Off(of.mean_shift, of.var_shift, *chances)


def _off_in_turn(module: WithStatistics, passes: Sequence[Sequence[Moments]], ema: _Ema) -> _Off:
    """The same of an EMA that several batches a pass move in turn, whatever their sizes are.

    Of K of them the k-th has the weight m (1 - m)^(K - k), so that over passes it is an EMA of
    their weighted means, of momentum 1 - (1 - m)^K.
    """
    calls, number, momentum = len(passes[0]), len(passes), ema.momentum
    weights = torch.tensor([(1 - (momentum or 0)) ** (calls - 1 - k) for k in range(calls)])
    statistics = torch.stack(
        [torch.stack([torch.stack([b.mean, b.unbiased_var()]) for b in of]) for of in passes]
    ).double()  # passes, calls, mean and variance, C
    weights = (weights / weights.sum()).to(statistics).view(-1, 1, 1)
    of_pass = (weights * statistics).sum(1)
    mean, var = of_pass.mean(0)
    units = torch.stack([var.sqrt(), var])
    noise = torch.where(units > 0, of_pass.var(0) / units.square(), 0.0).mean(1)
    m = 2 / (number + 1) if momentum is None else 1 - (1 - momentum) ** calls
    chances = (noise * (ema.noise(m) + 1 / number)).sqrt().tolist()
    old_mean, old_var = (b.to(of_pass) for b in (module.running_mean, module.running_var))
    return _Off(shift_of(old_mean, mean, units[0]), shift_of(old_var, var, units[1]), *chances)


def _chance(of: LayerReport, error: float, ema: _Ema) -> float:
    """The standard deviation of an EMA about what it estimates, with that of the estimate.

    A mean of all batches is as precise as that of as many as the passes had, at least.
    """
    m = 2 / (of.num_batches + 1) if ema.momentum is None else float(ema.momentum)
    of_batch = error * math.sqrt(of.num_batches)
    return math.hypot(of_batch * math.sqrt(ema.noise(m)), error)


def findings_of(seen: Seen, recompute: Recompute) -> Iterator[Finding]:
    """BN201 to BN203."""
    yield from stale(seen, recompute)
    yield from levels(seen, recompute)
    yield from sources(seen)
    yield from noisy(seen)


def stale(seen: Seen, recompute: Recompute) -> Iterator[Finding]:
    """BN201."""
    off = {of.name: of.worst for of in seen.layers if of.worst}
    if off:
        names, shift, error = furthest(off)
        why = (
            f"{len(off)} of {len(seen.layers)} layers have statistics that chance does not "
            f"explain on the weights as they are; the furthest is {names[0]}, by {shift:.3g} "
            f"(standard deviations of the mean, or relative to the variance), where an EMA would "
            f"be off by {error:.2g}"
        )
        severity = "error" if shift >= COSTS else "warning"
        yield Finding("BN201", severity, names, shift, why, recompute.usual, error)


def levels(seen: Seen, recompute: Recompute) -> Iterator[Finding]:
    """BN202, of layers that have several normalization batches a pass.

    A note where levels are no further apart than an EMA is from its batches by chance alone.
    """
    off = {}
    for name, of in seen.shares.items():
        bound = bound_of(of.passes, len(seen.shares))
        if name not in seen.frozen and of.excess > bound * of.error:
            off[name] = (of.share, of.error)
    if off:
        calls = {name: of.calls for name, of in seen.shares.items()}
        finding = of_levels(off, calls)._replace(treatment=recompute.per_level)
        chances = {of.name: of.mean_chance for of in seen.layers}
        if all(seen.shares[name].excess < chances[name] ** 2 for name in off):
            why = f"{finding.why}, less than an EMA is off by chance"
            finding = finding._replace(severity="note", why=why)
        yield finding


def of_levels(off: Mapping[str, tuple[float, float]], calls: Mapping[str, int]) -> Finding:
    """BN202, of layers by name.

    Args:
        off: the share of each one's variance that lies between its normalization batches, and its
            error.
        calls: how many of these there are in a pass.
    """
    names, share, error = furthest(off)
    why = (
        f"{count(len(off), 'layer')} called several times a pass ({names[0]} {calls[names[0]]} "
        "times), each level normalized by its own batch, and at test time all by the same "
        f"statistics: {_percent(share)} of {names[0]}'s variance lie between the levels"
    )
    return Finding("BN202", "warning", names, share, why, IN_CODE.per_level, error)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def counted(findings: Iterable[Finding], seen: Seen) -> Iterator[Finding]:
    """Findings of a state, with a note of what passes tell to be no fault.

    BN112 where layers are called as often as they have counted, of which BN202 tells what it costs.
    BN106 where statistics fit the weights, as they have been recomputed.
    """
    calls = {of.name: of.calls for of in seen.layers}
    off = {of.name for of in seen.layers if of.worst}
    for of in findings:
        if of.rule == "BN106" and off.isdisjoint(of.where) and calls.keys() >= {*of.where}:
            yield of._replace(severity="note", why=f"{of.why}; on images they fit the weights")
            continue
        if of.rule == "BN112" and all(calls.get(name) == of.value for name in of.where):
            why = f"{of.why}; a pass calls them {of.value:g} times"
            yield of._replace(severity="note", why=why)
        else:
            yield of


def sources(seen: Seen) -> Iterator[Finding]:
    """BN202, of sources of images.

    Where batches are of one source each, training normalizes each source by itself.
    """
    off = {
        name: (of.share, of.error)
        for name, of in seen.sources.items()
        if name not in seen.frozen and of.share > bound_of(of.passes, len(seen.sources)) * of.error
    }
    if off:
        names, share, error = furthest(off)
        first = seen.sources[names[0]]
        how = (
            "some batches mix them, and training normalizes these together, as test time does"
            if first.is_mixed
            else "each batch is of one, and normalized by itself, at test time all by the same"
        )
        why = (
            f"{count(len(off), 'layer')} with one set of statistics for {first.sources} sources of "
            f"images: {_percent(share)} of {names[0]}'s variance lie between the sources; {how}"
        )
        treatment = (
            "statistics for each source: MODEL.BN_SOURCES.PARTS with DATASETS.SOURCES, or "
            "bn_det.SourceBatchNorm2d in code; or batches that mix sources"
        )
        severity = "note" if first.is_mixed else "warning"
        yield Finding("BN202", severity, names, share, why, treatment, error)


ENOUGH = 16
"""Images in a normalization batch down to which BatchNorm is as good as with more.

Wu & He, *Group Normalization*, 2018, Table 2: with 32, 16, 8, 4 and 2 images of ImageNet a
ResNet-50 has an error of 23.6, 23.7, 24.8, 27.3 and 34.7 %.
"""


def noisy(seen: Seen) -> Iterator[Finding]:
    """BN203: of fewer independent values than so many images have at least, beyond chance."""
    from scipy.stats import chi2  # only for this: the layers need torch alone

    tests = sum(of.calls for of in seen.layers)
    few = {}
    for of in seen.layers:
        degrees = seen.estimates[of.name].num_batches - 1
        # By how much a variance is overestimated by chance, as if its channels were one.
        bound = float(chi2.isf(FALSE_ALARMS / tests, degrees)) / degrees if degrees else math.inf
        if of.noise**2 > bound / (ENOUGH - 1):
            # The variance in a batch lacks that of its mean: by one of the values.
            few[of.name] = (1 + of.noise**-2, of.noise**-2 * math.sqrt(2 / degrees))
    if few:
        names = tuple(sorted(few, key=lambda name: few[name]))
        fewest, error = few[names[0]]
        why = (
            f"{len(few)} of {len(seen.layers)} layers have a normalization batch whose mean varies "
            f"as that of fewer than {ENOUGH} independent values, {names[0]} as that of "
            f"{fewest:.2g}: by {(fewest - 1) ** -0.5:.2g} standard deviations from batch to batch"
        )
        treatment = (
            "more images in a normalization batch: SyncBN over processes, or more on each; where "
            "there are no more, statistics that are frozen (bn_det.freeze, SOLVER.FREEZE_BN_ITER), "
            "batch renormalization (NORM BRN) or GN"
        )
        yield Finding("BN203", "note", names, fewest, why, treatment, error)
