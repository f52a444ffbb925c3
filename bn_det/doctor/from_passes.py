"""What can be told of a model's BatchNorm from passes over images, of which nothing is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from ..layers.comm import Group, process_group
from ..layers.moments import Moments
from ..population.observation import Observed, Observer, PopulationLayer, population_layers
from ..population.report import LayerReport
from ..population.update import How, measure_statistics
from .chance import bound_of, standard_error
from .findings import COSTS, Finding, Measures, Recompute, count, furthest
from .losses import Values
from .modes import in_mode


class Seen(NamedTuple):
    """What the layers have seen.

    Attributes:
        num_batches: of all ranks.
        layers: their measures.
        shares: of each layer that is called several times a pass, in each pass the share of its
            variance that lies between the calls.
        statistics: mean and variance of all values that each layer has seen.
        called: the layer of each place of statistics, and the samples of a call, on average.
    """

    num_batches: int
    layers: list[Measures]
    shares: dict[str, list[float]]
    statistics: Values
    called: dict[str, tuple[nn.Module, float]]


class _LevelObserver(Observer):
    """Also looks at how the calls of a layer in a pass differ."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shares: dict[str, list[float]] = {}
        self.calls: dict[str, int] = {}

    def run(self, inputs: Any, observed: Observed) -> None:
        super().run(inputs, observed)
        for layer, batches in zip(self.layers, observed.batches, strict=True):
            if len(batches) > 1 and self._is_one_a_call(layer, len(batches)):
                self.shares.setdefault(layer.name, []).append(between_share(batches))
                self.calls[layer.name] = len(batches)

    def parts_a_pass(self, layer: PopulationLayer) -> int:
        """In how many parts, calls and domains, its samples come."""
        calls = self._usual_calls[layer.owner] if self._usual_calls else 1
        return max(calls, 1) * len(layer.domains)

    def _is_one_a_call(self, layer: PopulationLayer, number: int) -> bool:
        """Whether these are its calls, and not several normalization batches of one."""
        return self._usual_calls is not None and self._usual_calls[layer.owner] == number


def between_share(batches: Sequence[Moments]) -> float:
    """The share of a variance that lies between the sets of values and not in them.

    The mean over channels of (merged variance - mean variance within) / merged variance; channels
    without variance count as 0.
    """
    merged = Moments.merge(batches)
    counts = torch.stack([of.count for of in batches])
    weights = (counts / counts.sum()).unsqueeze(1)
    within = (weights * torch.stack([of.var.double() for of in batches])).sum(0)
    total = merged.var.double()
    share = torch.where(total > 0, 1 - within / total, 0.0)
    return float(share.clamp(min=0).mean()) if len(share) else 0.0


def look(
    model: nn.Module,
    batches: Iterable[Any],
    num_iters: int,
    call: Callable[[nn.Module, Any], Any] | None,
    group: Group,
    progress: str | None,
) -> Seen:
    """Run a model in training mode on batches, and leave it as it was.

    Raises:
        InputError: as :func:`bn_det.update_bn_stats`; there are fewer than two batches.
    """
    with in_mode(model, training=True):
        # Not frozen ones: their statistics are constants that the weights have been trained with.
        layers = population_layers(model)
        observer = _LevelObserver(partial(call, model) if call else model, model, layers)
        # What an EMA estimates is the mean of the batches' variances.
        how = How(num_iters, "mean_of_batch_variances", 0.0, True, process_group(group))
        found, report = measure_statistics(observer, batches, how, progress)
        if report.layers and report.num_batches < 2:
            raise InputError("batches: one is too few to tell chance from a fault; use 8 or more")
    momenta = {layer.name: layer.module.momentum for layer in layers}
    fewest = min((of.num_batches for of in report.layers), default=0)
    bound = bound_of(fewest, 2 * max(len(report.layers), 1))
    measures = [_measures(of, momenta[of.name], bound, observer) for of in report.layers]
    statistics = {
        layer.name: (estimate.mean, estimate.population_var)
        for layer, estimate in zip(layers, found, strict=True)
        if estimate is not None
    }
    by_name = {layer.name: layer for layer in layers}
    called = {
        of.name: (
            by_name[of.name].owner,
            of.num_samples / of.num_batches / observer.parts_a_pass(by_name[of.name]),
        )
        for of in report.layers
    }
    return Seen(report.num_batches, measures, observer.shares, statistics, called)


def _measures(
    of: LayerReport, momentum: float | None, bound: float, observer: _LevelObserver
) -> Measures:
    chances = [_chance(of, error, momentum) for error in (of.mean_error, of.var_error)]
    shares = observer.shares.get(of.name)
    return Measures(
        of.name,
        of.mean_shift,
        of.var_shift,
        *chances,
        bound,
        noise=of.mean_error * math.sqrt(of.num_batches),
        calls=observer.calls.get(of.name, 1),
        share=sum(shares) / len(shares) if shares else None,
    )


def _chance(of: LayerReport, error: float, momentum: float | None) -> float:
    """The standard deviation of an EMA about what it estimates, with that of the estimate.

    An EMA of weight m has m / (2 - m) of the variance of a batch's statistics, for batches of the
    size that the passes had. A mean of all batches is as precise as that of as many as the passes
    had, at least.
    """
    m = 2 / (of.num_batches + 1) if momentum is None else min(float(momentum), 1.0)
    of_batch = error * math.sqrt(of.num_batches)
    return math.hypot(of_batch * math.sqrt(m / (2 - m)), error)


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


def levels(seen: Seen) -> Iterator[Finding]:
    """BN202."""
    off = {}
    calls = {}
    for of in seen.layers:
        if of.share is None:
            continue
        shares = seen.shares[of.name]
        error = standard_error(shares)
        bound = bound_of(len(shares), len(seen.shares))
        # The means of calls differ as those of batches do, where nothing but chance is between.
        if of.share - bound * error > of.noise**2:
            off[of.name], calls[of.name] = (of.share, error), of.calls
    if off:
        finding = of_levels(off, calls)
        is_error = math.sqrt(finding.value) >= COSTS
        yield finding._replace(severity="error") if is_error else finding


def of_levels(off: Mapping[str, tuple[float, float]], calls: Mapping[str, int]) -> Finding:
    """BN202, of layers by name.

    Args:
        off: the share of each one's variance that lies between its calls, and its error.
        calls: of each, a pass.
    """
    names, share, error = furthest(off)
    why = (
        f"{count(len(off), 'layer')} called several times a pass ({names[0]} {calls[names[0]]} "
        "times), each call normalized by its own batch, and at test time all by the same "
        f"statistics: {100 * share:.0f} % of {names[0]}'s variance lie between the calls"
    )
    treatment = (
        "statistics for each level: MODEL.RETINANET.BN.POPULATION per_domain, or "
        "bn_det.DomainBatchNorm2d in code"
    )
    return Finding("BN202", "warning", names, share, why, treatment, error)
