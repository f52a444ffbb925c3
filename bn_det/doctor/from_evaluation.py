"""What can be told of population statistics from what layers see where these normalize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.ema import mean_statistics
from ..layers.moments import Moments
from ..population.estimate import Accumulator, Estimate, estimates
from ..population.observation import Observed, Observer, PopulationLayer
from ..population.unchanged import put_back
from .chance import bound_of
from .findings import COSTS, Finding, Recompute, Shift, amount, furthest
from .losses import Losses


class Watch:
    """Takes the moments of what layers see in passes in which population statistics normalize.

    Called before each of these passes; what it does to the model is to be undone after it.

    Attributes:
        places: that are looked at.
        statistics: what they hold at the first pass, mean and variance of each.
        passes: what they have seen in each.
    """

    def __init__(self, model: nn.Module, places: Sequence[PopulationLayer]) -> None:
        self.places = places
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self.passes: list[Observed] = []
        self._observer = Observer(model, model, places, by_batch=False)

    def __call__(self) -> None:
        if not self.passes:
            modules = [place.module for place in self.places]
            self.statistics = [
                (
                    m.running_mean.to(torch.float64, copy=True),
                    m.running_var.to(torch.float64, copy=True),
                )
                for m in modules
            ]
        self.passes.append(Observed([[] for _ in self.places], [0] * len(self.places)))
        self._observer.watch(self.passes[-1])

    def estimates(self) -> list[Estimate | None]:
        """Of each place; None where it was not used, or has seen what is not finite."""
        if not self.places:
            return []
        channels = [len(mean) for mean, _ in self.statistics]
        device = self.statistics[0][0].device
        sums = Accumulator(channels, "mean_of_batch_variances", device)
        for seen in self.passes:
            finite = sums.add(seen.batches)
            if not all(finite):
                return [None] * len(self.places)
        return estimates([sums.sums.cpu()], channels, "mean_of_batch_variances")


class Inputs(NamedTuple):
    """What layers have seen on the same batches, where population statistics normalize.

    Attributes:
        old: with the statistics that the model has.
        new: with those of other batches.
        noisy: with the latter and the noise that an EMA has.
        detected: in evaluation mode, with those of the model; None where that has the same samples.
    """

    old: Watch
    new: Watch
    noisy: list[Watch]
    detected: Watch | None


def detections(losses: Losses, trained: Watch) -> Watch | None:
    """What layers see of the same batches in evaluation mode: proposals of test time, say.

    Only the first batch is run where no layer sees another number of samples then, or where the
    model, as it is called, cannot be run in evaluation mode.

    Args:
        trained: has seen the same batches in training mode.
    """
    model = losses.model
    watch = Watch(model, trained.places)
    if not trained.places:
        return None
    for batch, of_training in zip(losses.batches, trained.passes, strict=True):
        # What makes a loss of its output may well fail, after the model has run.
        with torch.no_grad(), put_back(model), suppress(Exception):
            model.eval()
            watch()
            losses.run(batch)
        if len(watch.passes) == 1 and not any(_changed(of_training, watch.passes[0])):
            return None
    return watch


def _changed(of_training: Observed, detected: Observed) -> list[bool]:
    """Which layers have seen samples in both, and another number."""
    pairs = zip(of_training.samples, detected.samples, strict=True)
    return [0 < b != a > 0 for a, b in pairs]


def shifts(seen: Inputs) -> list[Shift]:
    """How far the model's statistics are from those of what layers see in evaluation.

    The estimation shift of Huang et al., *Delving into the Estimation Shift of Batch Normalization
    in a Network*, CVPR 2022: a layer's own statistics are off, and so are those of the layers
    before it, which move its input. Chance is what the noise of an EMA in all layers does to it,
    measured with draws of it, and the standard error over the batches.
    """
    places, drawn = seen.old.places, [_vectors(run) for run in seen.noisy]
    estimates, old, new = seen.old.estimates(), _vectors(seen.old), _vectors(seen.new)
    # As if all channels were one: what a layer hands on moves them together.
    bound = bound_of(len(seen.noisy) + 1, 2 * max(len(places), 1))
    found = []
    for k, (place, estimate) in enumerate(zip(places, estimates, strict=True)):
        offs = [run[k] for run in (old, new, *drawn)]
        known = [off for off in offs if off is not None]
        if estimate is None or len(known) < len(offs):
            continue
        of_old, of_new, *noisy = known
        of_mean, of_var = (torch.stack(noisy) - of_new).square().mean((0, 2)).tolist()
        chances = (of_mean + estimate.mean_error**2) ** 0.5, (of_var + estimate.var_error**2) ** 0.5
        found.append(Shift(place.name, *_sizes(of_old), *chances, bound))
    return found


def _sizes(off: Tensor) -> tuple[float, float]:
    """Root mean squares over channels of mean and variance."""
    mean, var = off.square().mean(1).sqrt().tolist()
    return mean, var


def _vectors(run: Watch) -> list[Tensor | None]:
    """Of each place how far its statistics are off, in standard deviations, shape (2, C)."""
    found: list[Tensor | None] = []
    for (mean, var), of in zip(run.statistics, run.estimates(), strict=True):
        if of is None:
            found.append(None)
            continue
        off = torch.stack(
            [(mean.to(of.mean) - of.mean) / of.var.sqrt(), var.to(of.var) / of.var - 1]
        )
        found.append(torch.where(of.var > 0, off, 0.0))
    return found


def findings_of(
    found: Sequence[Shift], seen: Inputs, recompute: Recompute, own: Sequence[str]
) -> Iterator[Finding]:
    """BN206 and BN207.

    Args:
        own: rules by which statistics have been found to be off themselves.
    """
    yield from accumulated(found, seen, recompute, own)
    yield from proposals(seen, recompute)


def accumulated(
    found: Sequence[Shift], seen: Inputs, recompute: Recompute, own: Sequence[str]
) -> Iterator[Finding]:
    """BN206; a note where statistics are off themselves, as what these do is no second fault."""
    off = {of.name: of.worst for of in found if of.worst}
    if not off:
        return
    names, shift, chance = furthest(off)
    third = max(len(found) // 3, 1)
    first, last = (_root_mean_square(part) for part in (found[:third], found[-third:]))
    pairs = zip(seen.new.places, _vectors(seen.new), strict=True)
    left = next(max(_sizes(v)) for of, v in pairs if of.name == names[0] and v is not None)
    why = (
        f"in evaluation the inputs of {len(off)} of {len(found)} layers have other statistics than "
        f"those that normalize them, those of {names[0]} by {amount(shift)} (standard deviations "
        "of the mean, or relative to the variance), where the noise of EMAs would make it "
        f"{chance:.2g}; over depth it goes from {amount(first, 2)} in the first third of the "
        f"layers to {amount(last, 2)} in the last; with recomputed statistics that of {names[0]} "
        f"is {left:.2g}"
    )
    if own:
        why += f"; statistics that are off themselves ({', '.join(own)}) may be all of it"
    severity = "warning" if shift >= COSTS and not own else "note"
    yield Finding("BN206", severity, names, shift, why, recompute.usual, chance)


def _root_mean_square(found: Sequence[Shift]) -> float:
    return (sum(max(of.mean_shift, of.var_shift) ** 2 for of in found) / len(found)) ** 0.5


def proposals(seen: Inputs, recompute: Recompute) -> Iterator[Finding]:
    """BN207."""
    off = {of.name: of.worst for of in proposal_shifts(seen) if of.worst}
    if not off or seen.detected is None:
        return
    names, shift, error = furthest(off)
    place = [place.name for place in seen.old.places].index(names[0])
    sampled, tested = (
        sum(of.samples[place] for of in passes) / len(passes)
        for passes in (seen.old.passes, seen.detected.passes)
    )
    why = (
        f"{len(off)} layers see other samples at test time, {names[0]} {tested:.0f} a batch and "
        f"not the {sampled:.0f} that training samples: on the same images their statistics are off "
        f"by {shift:.3g} (standard deviations of the mean, or relative to the variance)"
    )
    treatment = (
        f"{recompute.as_tested} takes statistics of the proposals of test time; or a norm without "
        "population statistics in that head (GN)"
    )
    harm = "it may harm, as the head has been trained on what training samples"
    severity = "warning" if shift >= COSTS else "note"
    yield Finding("BN207", severity, names, shift, why, treatment, error, untried=harm)


def proposal_shifts(seen: Inputs) -> list[Shift]:
    """Of layers that see other samples in evaluation, how far statistics of these are off.

    From batch to batch, on the same images and by the same population statistics.
    """
    if seen.detected is None:
        return []
    pairs = list(zip(seen.old.passes, seen.detected.passes, strict=True))
    changed = [any(of) for of in zip(*(_changed(a, b) for a, b in pairs), strict=True)]
    found = []
    for k, place in enumerate(seen.old.places):
        both = [(a.batches[k], b.batches[k]) for a, b in pairs if a.batches[k] and b.batches[k]]
        if changed[k] and len(both) > 1:
            bound = bound_of(len(both), 2 * sum(changed))
            if (shift := _paired(place.name, both, bound)) is not None:
                found.append(shift)
    return found


def _paired(
    name: str, pairs: Sequence[tuple[list[Moments], list[Moments]]], bound: float
) -> Shift | None:
    """Of the statistics of each batch; None where they are not finite."""
    sampled, tested = (
        torch.stack([torch.stack(mean_statistics(of)) for of in passes]).double()
        for passes in zip(*pairs, strict=True)
    )  # batches, mean and variance, C
    var = sampled[:, 1].mean(0)
    units = torch.stack([var.sqrt(), var])
    off = torch.where(units > 0, (tested - sampled) / units, 0.0)
    if not off.isfinite().all():
        return None
    of_mean, of_var = (off.var(0) / len(off)).mean(1).sqrt().tolist()
    return Shift(name, *_sizes(off.mean(0)), of_mean, of_var, bound)
