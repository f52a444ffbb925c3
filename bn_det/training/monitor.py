"""What happens to BatchNorm in a training: metrics now and then, and a warning when it goes wrong.

The running statistics before and after some steps say nearly all of it (``movement.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..doctor.chance import FALSE_ALARMS
from ..doctor.findings import COSTS, Finding, count, furthest
from ..doctor.from_passes import of_levels
from ..doctor.from_training import (
    Step,
    Updates,
    modes_left,
    several_updates,
    small_batches,
    updates_without_step,
)
from ..doctor.rules import RULES
from ..doctor.shares import Share
from ..errors import InputError
from ..layers.comm import all_gather, process_group, world
from ..layers.kinds import unwrapped
from ..population.observation import PopulationLayer, places_with_statistics
from .between_calls import Calls, CallWatch
from .hooks import Hook
from .in_steps import Look, SampleWatch, updates_in_steps
from .movement import Moves, Snapshot, moves, updates_of

logger = logging.getLogger(__name__)

PERIOD = 100
"""Iterations between two looks, by default."""

WINDOW = 16
"""Successive steps that a look is at, if the period has as many."""

FIRST = 100
"""The number of the first iteration, from 1, at which staleness is judged.

By then an EMA of torch's momentum has 0.9^100, 3e-5, of a new layer's values left; one that has
more forgets too slowly.
"""


class Monitor(Hook):
    """Writes how BatchNorm fares every so many iterations, and warns once a rule of the doctor.

    At the end of each period, from its last WINDOW steps, these go to the trainer's metrics; each
    is the largest of all layers, whose name is in the log:

    * ``bn_monitor/staleness``: how far running statistics are from those of the batches, less what
      noise explains, in standard deviations of the layer's input (of variances, relative to it).
    * ``bn_monitor/noise``: by how much the mean of a normalization batch varies from step to step.
    * ``bn_monitor/between_share``: of layers that are called several times a pass, the share of
      their variance that lies between the calls, less what noise explains.
    * ``bn_monitor/rank_spread``: the standard deviation of running statistics over the ranks.
    * ``bn_monitor/non_finite``: the number of values that are NaN or infinite, in all layers.

    The training is the same as without it, to the bit. It is to be registered on every rank, after
    the hooks that freeze layers, and before those that recompute, evaluate and save.

    Args:
        period: the iterations between two looks, 2 or more.

    Raises:
        InputError: it is less, or no integer.
    """

    expects_passes_between_steps = False
    """Whether something runs the model in training mode between steps, on purpose."""

    def __init__(self, period: int = PERIOD) -> None:
        is_integer = isinstance(period, Integral)
        if not is_integer or period < 2:
            raise InputError(
                f"period: {period!r} is not accepted; use 2 iterations or more, an integer, as "
                "noise is what differs between two"
            )
        self.period = period
        self._window: _Window | None = None
        self._called_often: set[nn.Module] | None = None
        self._samples = SampleWatch()
        self._has_sampled = False
        self._earlier: Look | None = None
        self._said: set[tuple[str, str]] = set()

    def before_step(self) -> None:
        left = self.period - 1 - self.trainer.iter % self.period
        if left < min(WINDOW, self.period):
            self._window = self._window or _Window(self.trainer.model)
            self._window.before_step(self._called_often)
            if not self._has_sampled:  # in the first step that is looked at
                self._has_sampled = True
                self._samples.start(self.trainer.model, self._window.places)

    def after_step(self) -> None:
        window = self._window
        if window is None:
            return
        window.after_step()
        self._samples.stop()
        if self._called_often is None:
            self._called_often = window.called_often()
        if (self.trainer.iter + 1) % self.period == 0:
            self._window = None
            self._called_often = window.called_often()
            if window.places:
                self._look(window)

    def after_train(self) -> None:
        if self._window is not None:  # that ends early, or with an error
            self._window.watch.stop()
            self._samples.stop()
        places = places_with_statistics(unwrapped(self.trainer.model))
        with suppress(RuntimeError):  # where the device has failed, and the training with it
            if places:
                broken = _broken(places, Snapshot.of(places))
                self._warn(_broken_finding(places, broken.tolist(), self.trainer.iter))

    def write(self, scalars: dict[str, float]) -> None:
        """Hand metrics to the trainer."""
        self.trainer.put_scalars(scalars)

    def _look(self, window: _Window) -> None:
        seen = window.seen()
        figures = {
            "staleness": _largest(seen.names, _staleness(seen.moves)),
            "noise": _largest(seen.names, seen.moves.mean_noise.tolist()),
            "between_share": _largest(
                list(seen.shares), [max(of.excess, 0.0) for of in seen.shares.values()]
            ),
        }
        if seen.ranks is not None:
            spreads = torch.maximum(seen.ranks.mean_spread, seen.ranks.var_spread)
            figures["rank_spread"] = _largest(seen.names, spreads.tolist())
        known = {name: figure for name, figure in figures.items() if figure is not None}
        scalars = {f"bn_monitor/{name}": value for name, (_, value) in known.items()}
        self.write({**scalars, "bn_monitor/non_finite": float(sum(seen.broken))})
        words = [f"{name} {value:.3g} ({where})" for name, (where, value) in known.items()]
        logger.info("BatchNorm: %s", ", ".join(words) or "nothing that training updates")
        num_looks = max(self.trainer.max_iter // self.period, 1)
        for finding in _findings(seen, num_looks, self.trainer.iter):
            self._warn(finding)
        for finding in self._of_steps(window, seen):
            self._warn(finding)

    def _of_steps(self, window: _Window, seen: _Seen) -> Iterator[Finding | None]:
        """What is known of the steps, whatever the values of statistics are."""
        step = Step(world()[1], max(self._samples.passes, 1))
        yield from small_batches(self._samples.called, step)
        yield several_updates(window.several_updates())
        look, earlier = window.look(self.trainer.iter, seen.moves), self._earlier
        self._earlier = look
        extra = look.extra_since(earlier)
        if extra and not self.expects_passes_between_steps:
            yield updates_without_step(extra)
        is_evaluated = not unwrapped(self.trainer.model).training
        yield from modes_left({} if earlier is None else earlier.modes, look.modes, is_evaluated)

    def _warn(self, of: Finding | None) -> None:
        if of is None or (of.rule, of.severity) in self._said:
            return
        self._said.add((of.rule, of.severity))
        logger.log(
            logging.INFO if of.severity == "note" else logging.WARNING,
            "%s at iteration %d: %s, in %s: %s; %s. More: bn-det doctor --explain %s",
            *(of.rule, self.trainer.iter, RULES[of.rule].says, of.place, of.why, of.treatment),
            of.rule,
        )


class _Ranks(NamedTuple):
    """How the ranks differ, shape (places,), in the units of Moves.

    Attributes:
        mean_spread, var_spread: standard deviations over ranks.
        mean_noise, var_noise: of a rank's batches, root mean squares over ranks.
        number: of ranks.
    """

    mean_spread: Tensor
    var_spread: Tensor
    mean_noise: Tensor
    var_noise: Tensor
    number: int


class _Seen(NamedTuple):
    """What a look has seen.

    Attributes:
        places: of population statistics.
        broken: values of each that are NaN or infinite, of the rank that has most.
        shares: by the names of layers.
        ranks: None for a single one.
    """

    places: list[PopulationLayer]
    moves: Moves
    broken: list[int]
    shares: Mapping[str, Share]
    ranks: _Ranks | None

    @property
    def names(self) -> list[str]:
        return [place.name for place in self.places]


class _Window:
    """The steps that a look is at."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.places = model, places_with_statistics(unwrapped(model))
        self.watch = CallWatch()
        self._befores: list[Snapshot] = []
        self._afters: list[Snapshot] = []
        self._calls: list[Calls | None] = []

    def before_step(self, watched: set[nn.Module] | None) -> None:
        self.watch.stop()  # of a step that has failed
        del self._befores[len(self._afters) :]
        if self.places:
            self._befores.append(Snapshot.of(self.places))
        of_watched = [place for place in self.places if watched and place.module in watched]
        if of_watched:
            self.watch.start(self.model, of_watched)

    def after_step(self) -> None:
        calls = self.watch.stop()
        if self.places:
            self._afters.append(Snapshot.of(self.places))
            self._calls.append(calls)

    def called_often(self) -> set[nn.Module]:
        """The layers whose EMA has been updated several times in a step."""
        if not self._afters:
            return set()
        most = updates_of(self._befores, self._afters).amax(0).tolist()
        return {place.module for place, n in zip(self.places, most, strict=True) if n > 1}

    def several_updates(self) -> dict[str, Updates]:
        """Of the places that a step has updated several times."""
        return updates_in_steps(self.places, self._befores, self._afters, self._calls)

    def look(self, iteration: int, moves: Moves) -> Look:
        """At counters and modes, after the last step."""
        has_moved = (moves.steps > 0).tolist()
        return Look.at(iteration, self.places, self._befores, self._afters, has_moved)

    def seen(self) -> _Seen:
        found, var = moves(self.places, self._befores, self._afters)
        broken = _broken(self.places, self._afters[-1])
        group = process_group("world")
        if group is None:
            return _Seen(self.places, found, broken.tolist(), self.watch.shares(), None)
        own = [*self._afters[-1][:2], found.mean_noise, found.var_noise, broken]
        flat = torch.cat([of.to(var.device, torch.float64) for of in own])
        *statistics, mean_noise, var_noise, broken = all_gather(flat, group).split(
            [len(of) for of in own], 1
        )
        channels = [place.module.running_mean.numel() for place in self.places]
        spreads = [
            torch.stack([of.mean() for of in (values.var(0) / unit).split(channels)]).sqrt()
            for values, unit in zip(statistics, (var, var.square()), strict=True)
        ]
        noises = [noise.square().mean(0).sqrt() for noise in (mean_noise, var_noise)]
        of_mean, of_var, by_mean, by_var = torch.stack([*spreads, *noises]).cpu()
        ranks = _Ranks(of_mean, of_var, by_mean, by_var, len(mean_noise))
        most = broken.amax(0).long().tolist()
        return _Seen(self.places, found, most, self.watch.shares(), ranks)


@torch.no_grad()
def _broken(places: Sequence[PopulationLayer], last: Snapshot) -> Tensor:
    """The values of each place, and of the weight and bias beside it, that are NaN or infinite."""
    affines = _affines(places)
    channels = [place.module.running_mean.numel() for place in places]
    statistics = ~(last.mean.isfinite() & last.var.isfinite())
    of_statistics = torch.stack([of.sum() for of in statistics.split(channels)])
    values = [p.detach().flatten().to(last.mean.device) for of in affines for p in of]
    if not values:
        return of_statistics
    flat = ~torch.cat(values).isfinite()
    sizes = [sum(p.numel() for p in of) for of in affines]
    return of_statistics + torch.stack([of.sum() for of in flat.split(sizes)])


def _affines(places: Sequence[PopulationLayer]) -> list[list[nn.Parameter]]:
    """Weight and bias of each place; those that places share are the first one's."""
    seen: set[Tensor] = set()
    found = []
    for place in places:
        modules = dict.fromkeys([place.owner, place.module])
        own = [p for module in modules for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        found.append(own)
    return found


def _broken_finding(
    places: Sequence[PopulationLayer], broken: Sequence[int], iteration: int
) -> Finding | None:
    """BN107."""
    off = {place.name: n for place, n in zip(places, broken, strict=True) if n}
    if not off:
        return None
    # The first one of the model, as the others may have it from there.
    names = tuple(off)
    why = f"{count(off[names[0]], 'value')} of {names[0]} after iteration {iteration}"
    treatment = (
        "bn_det.update_bn_stats mends statistics, if the weights are finite; train on from an "
        "earlier checkpoint, with a lower rate or outside of half precision"
    )
    return Finding("BN107", "error", names, sum(off.values()), why, treatment)


def _staleness(of: Moves) -> list[float]:
    """The larger shift of each place, less what noise explains."""
    pairs = (of.mean_shift, of.mean_noise), (of.var_shift, of.var_noise)
    excess = [(shift.square() - (noise * of.chance).square()) for shift, noise in pairs]
    return torch.maximum(*excess).clamp(min=0).sqrt().tolist()


def _findings(seen: _Seen, num_looks: int, iteration: int) -> Iterator[Finding | None]:
    yield _broken_finding(seen.places, seen.broken, iteration)
    if iteration + 1 >= FIRST:
        yield _stale(seen, num_looks)
    yield _levels(seen, num_looks)
    yield _apart(seen, num_looks)


def _stale(seen: _Seen, num_looks: int) -> Finding | None:
    """BN201, where it costs."""
    of = seen.moves
    pairs = (of.mean_shift, of.mean_noise * of.chance), (of.var_shift, of.var_noise * of.chance)
    off = _beyond_chance(seen, pairs, 1, num_looks, COSTS)
    if not off:
        return None
    names, shift, chance = furthest(off)
    why = (
        f"the running statistics of {count(len(off), 'layer')} are a standard deviation and more "
        f"from those of the batches, of {names[0]} {shift:.3g}, where chance is {chance:.2g}: an "
        "evaluation now has another model than training"
    )
    treatment = (
        "TEST.PRECISE_BN.ENABLED True (bn_det.training.PreciseBN) recomputes them before each "
        "evaluation; they are late while weights move fast, or if momentum is small"
    )
    return Finding("BN201", "error", names, shift, why, treatment, chance)


def _levels(seen: _Seen, num_looks: int) -> Finding | None:
    """BN202."""
    off: dict[str, tuple[float, float]] = {}
    for name, of in seen.shares.items():
        # One-sided.
        bound = _bound(2 * FALSE_ALARMS / (len(seen.shares) * num_looks), 1, of.passes - 1)
        if of.excess > bound * of.error:
            off[name] = (of.share, of.error)
    calls = {name: of.calls for name, of in seen.shares.items()}
    return of_levels(off, calls) if off else None


def _apart(seen: _Seen, num_looks: int) -> Finding | None:
    """BN204."""
    of = seen.ranks
    if of is None:
        return None
    of_ema = seen.moves.ema_chance
    pairs = (of.mean_spread, of.mean_noise * of_ema), (of.var_spread, of.var_noise * of_ema)
    off = _beyond_chance(seen, pairs, of.number - 1, num_looks)
    if not off:
        return None
    names, spread, chance = furthest(off)
    why = (
        f"the running statistics of {count(len(off), 'layer')} differ from rank to rank by more "
        f"than noise explains, those of {names[0]} by {spread:.3g} standard deviations, where "
        f"chance is {chance:.2g}: ranks have other data, other weights or other modes"
    )
    treatment = (
        "NORM SyncBN, or ranks that draw from all of the data; SOLVER.AVERAGE_BN_STATISTICS True "
        "averages them before evaluation and saving"
    )
    return Finding("BN204", "warning", names, spread, why, treatment, chance)


def _beyond_chance(
    seen: _Seen,
    pairs: Sequence[tuple[Tensor, Tensor]],
    of_shift: int,
    num_looks: int,
    least: float = 0.0,
) -> dict[str, tuple[float, float]]:
    """The places of which something is further off than chance explains, each with both.

    Args:
        pairs: how far, and its standard deviation by chance, shape (places,).
        of_shift: as in :func:`_bound`.
        least: what a place has to be off by in any case.
    """
    off: dict[str, tuple[float, float]] = {}
    rate = FALSE_ALARMS / (2 * len(seen.places) * num_looks)
    for k, name in enumerate(seen.names):
        bound = _bound(rate, of_shift, float(seen.moves.pairs[k]))
        for shifts, chances in pairs:
            shift, chance = float(shifts[k]), float(chances[k])
            if max(bound * chance, least) < shift < math.inf:
                off[name] = max(off.get(name, (0.0, 0.0)), (shift, chance))
    return off


@lru_cache(maxsize=256)
def _bound(rate: float, of_shift: int, pairs: float) -> float:
    """The ratio to its standard deviation that chance alone does not reach, at a rate.

    Of an F distribution, as the channels of a layer may be as good as one.

    Args:
        of_shift: degrees of freedom of what is compared.
        pairs: of successive steps, from which the noise is known.
    """
    from scipy.stats import f  # only for this: the layers need torch alone

    if pairs < 1:
        return math.inf
    return math.sqrt(float(f.isf(rate, of_shift, 2 * pairs**2 / (3 * pairs - 1))))


def _largest(names: Sequence[str], values: Sequence[float]) -> tuple[str, float] | None:
    """With its name; None if none is finite."""
    known = [(value, name) for name, value in zip(names, values, strict=True) if value < math.inf]
    return max(known)[::-1] if known else None
