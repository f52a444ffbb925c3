"""What can be told of population statistics from losses, on images apart from those of passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers.freeze import is_frozen
from ..layers.kinds import batch_norms
from ..population.observation import population_layers
from .blame import attribute, parts_of
from .chance import bound_of, standard_error
from .findings import Finding, Recompute, value_of
from .from_evaluation import Inputs, Watch, detections
from .from_passes import Seen
from .losses import Losses, Values, put, statistics_of
from .modes import in_mode

DRAWS = 4
"""Of the noise of an EMA."""


class Compared(NamedTuple):
    """Losses of the same batches, shape (number of batches,).

    Attributes:
        old: by the statistics that the model has.
        new: by those of other batches, of which the passes were.
        noisy: by the latter with the noise that an EMA has; shape (DRAWS, number of batches).
        batch: by those of each batch.
        thawed: as ``old``, but frozen layers by those of each batch; None if there are none, or
            one that does more than normalize.
        parts: by part of the model what its old statistics add; empty where they add nothing.
        layers: of each part.
        inputs: what layers have seen in those passes.
        left_out: batches beside them whose loss is not finite by any statistics.
    """

    old: Tensor
    new: Tensor
    noisy: Tensor
    batch: Tensor
    thawed: Tensor | None
    parts: dict[str, Tensor]
    layers: dict[str, list[str]]
    inputs: Inputs
    left_out: int


class Difference(NamedTuple):
    """Of two losses of the same batches.

    Attributes:
        value: the mean; infinite if a loss is.
        error: its standard error.
        bound: what chance explains.
    """

    value: float
    error: float
    bound: float

    @classmethod
    def of(cls, values: Tensor, num_tests: int = 1) -> Difference:
        """Of the differences of each batch; for several tests of one rule."""
        if not values.isfinite().all():
            return cls(math.inf if values.max() == math.inf else -math.inf, math.nan, 0.0)
        error = standard_error(values.tolist())
        return cls(float(values.mean()), error, bound_of(len(values), num_tests) * error)

    @property
    def is_more(self) -> bool:
        """Whether the first loss is larger, and chance does not explain it."""
        return self.value > self.bound

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}" if math.isfinite(self.value) else "infinity"


def compare(losses: Losses, seen: Seen) -> Compared:
    """Losses by the statistics of a model and by those of passes; the model is left as it is.

    Raises:
        InputError: the model gives no loss.
    """
    model = losses.model
    old = statistics_of(model)
    with in_mode(model, training=True):
        by_name = {place.name: place for place in population_layers(model)}
        places = [by_name[name] for name in seen.statistics if name in by_name]
    watches = [Watch(model, places) for _ in range(DRAWS + 2)]
    try:
        with losses.passes("losses", num_passes(model)):
            of_old = losses.of(watches[0])
            detected = detections(losses, watches[0])
            of_batch = losses.by_batch({place.owner for place in places})
            of_thawed = _thawed(losses)
            draws = zip(_draws(seen), watches[2:], strict=True)
            noisy = torch.stack([_by(losses, drawn, watch) for drawn, watch in draws])
            of_new = _by(losses, seen.statistics, watches[1])
        told = _judged(torch.stack([of_old, of_new, of_batch, *noisy]))
        losses.keep(told)
        of_old, of_new, of_batch, noisy = of_old[told], of_new[told], of_batch[told], noisy[:, told]
        of_thawed = None if of_thawed is None else of_thawed[told]
        parts, layers = {}, {}
        if places and _cost(of_old, noisy).is_more:
            layers = parts_of([place.name for place in places])
            with losses.passes("losses by part", 2 * len(layers)):
                parts = attribute(losses, old, seen.statistics, layers, (of_old, of_new))
    finally:
        put(model, old)
    inputs = Inputs(watches[0], watches[1], watches[2:], detected)
    left_out = len(told) - int(told.sum())
    return Compared(of_old, of_new, noisy, of_batch, of_thawed, parts, layers, inputs, left_out)


def _judged(losses: Tensor) -> Tensor:
    """Which batches tell statistics apart: not those of a loss that is finite by none.

    Args:
        losses: by several statistics, shape (*, number of batches).

    Returns:
        shape (number of batches,); all of them where fewer than two do.
    """
    finite = losses.isfinite().any(0)
    return finite if finite.sum() > 1 else torch.ones_like(finite)


def num_passes(model: nn.Module) -> int:
    """Of each batch, where nothing costs loss."""
    return 3 + DRAWS + has_frozen(model)


def has_frozen(model: nn.Module) -> bool:
    """Whether a model has frozen layers."""
    return any(map(is_frozen, batch_norms(model)))


def _by(losses: Losses, statistics: Values, watch: Watch) -> Tensor:
    put(losses.model, statistics)
    return losses.of(watch)


def _draws(seen: Seen) -> Iterator[Values]:
    """The statistics of the passes with the noise that an EMA has."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        drawn = {}
        for of in seen.layers:
            mean, var = seen.statistics[of.name]
            normal = torch.randn(2, len(mean), dtype=torch.float64, generator=generator).to(mean)
            noise = of.mean_chance * normal[0] * var.sqrt()
            drawn[of.name] = mean + noise, var * (of.var_chance * normal[1]).exp()
        yield drawn


def _cost(old: Tensor, noisy: Tensor) -> Difference:
    """What the old statistics cost more than those of an EMA do; also its draws vary."""
    found = Difference.of(old - noisy.mean(0))
    if not math.isfinite(found.value):
        return found
    of_draws = noise_of_an_ema(noisy)
    chance = math.hypot(found.bound, of_draws.bound)
    return Difference(found.value, math.hypot(found.error, of_draws.error), chance)


def noise_of_an_ema(noisy: Tensor) -> Difference:
    """What one more draw of it does to the mean loss: 0, and what chance explains.

    Statistics of a training are one, where nothing is wrong with them. A loss that is infinite by
    draws is explained, whatever it is.
    """
    if not noisy.isfinite().all():
        return Difference(0.0, math.nan, math.inf)
    error = standard_error(noisy.mean(1).tolist()) * math.sqrt(DRAWS + 1)
    return Difference(0.0, error, bound_of(DRAWS, 1) * error)


def _thawed(losses: Losses) -> Tensor | None:
    if not has_frozen(losses.model):
        return None
    try:
        return losses.thawed()
    except InputError:
        return None


def findings_of(seen: Compared, recompute: Recompute) -> Iterator[Finding]:
    """BN301 to BN304."""
    yield from _costs(seen, recompute)
    yield from _by_batch(seen)
    yield from _frozen(seen, recompute)


def _costs(seen: Compared, recompute: Recompute) -> Iterator[Finding]:
    """BN301, and BN302 of the parts that add a tenth of it at least."""
    cost = _cost(seen.old, seen.noisy)
    if not cost.is_more:
        return
    blamed = {part: Difference.of(of, len(seen.parts)) for part, of in seen.parts.items()}
    blamed = {part: of for part, of in blamed.items() if of.is_more and of.value >= cost.value / 10}
    ordered = sorted(blamed, key=lambda part: -blamed[part].value)
    where = tuple(layer for part in ordered for layer in seen.layers[part])
    why = (
        f"on {len(seen.old)} batches apart the loss is {_mean(seen.old)} by the population "
        f"statistics, {_mean(seen.new)} by those of the passes, {_mean(seen.noisy)} with the "
        f"noise of an EMA, and {_mean(seen.batch)} by those of each batch"
    )
    if seen.left_out:
        why += f"; {seen.left_out} more have no finite loss by any statistics, and are left out"
    if seen.parts and not ordered:
        why += "; that it is of one part and not of others is not beyond chance"
    yield Finding("BN301", "error", where, cost.value, why, recompute.usual, cost.error)
    if ordered:
        worst = blamed[ordered[0]]
        shares = ", ".join(f"{part or 'the model'} {blamed[part]}" for part in ordered)
        added = f"the {cost.value:.3g} that statistics add to the loss"
        if not math.isfinite(cost.value):
            added = "what the statistics add to a loss that is NaN or infinite by them"
        why = f"of {added}: {shares}"
        yield Finding("BN302", "error", where, worst.value, why, recompute.usual, worst.error)


def _by_batch(seen: Compared) -> Iterator[Finding]:
    """BN303."""
    off = Difference.of(seen.new - seen.batch)
    if off.is_more:
        why = (
            f"by the statistics of each batch the loss is lower by {off} than by those of the "
            "passes, which are as precise as statistics can be: the model reads its batch, or was "
            "trained with batches that are too small for any other statistics"
        )
        treatment = (
            "in training, not in the file: a larger normalization batch (SyncBN), FrozenBN for "
            "the last part (SOLVER.FREEZE_BN_ITER), or shuffled RoIs; bn-det leakage "
            "tells whether a RoI head leaks"
        )
        yield Finding("BN303", "note", (), off.value, why, treatment, off.error)


def _frozen(seen: Compared, recompute: Recompute) -> Iterator[Finding]:
    """BN304."""
    if seen.thawed is None:
        return
    off = Difference.of(seen.old - seen.thawed)
    if off.is_more:
        why = (
            f"with the frozen layers normalizing by their batch the loss is lower by {off}: their "
            "statistics do not fit these images"
        )
        treatment = (
            f"{recompute.frozen}; or thaw them (bn_det.thaw) with a normalization batch of 16 and "
            "more"
        )
        yield Finding("BN304", "warning", (), off.value, why, treatment, off.error)


def _mean(losses: Tensor) -> str:
    return value_of(float(losses.mean()))
