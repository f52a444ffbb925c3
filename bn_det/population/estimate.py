"""Estimates of population statistics from batches, and how precise they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.ema import mean_statistics
from ..layers.moments import Moments

ESTIMATORS = ("population_variance", "mean_of_batch_variances")
"""The variance of all values together (biased: over their number); or the mean of the unbiased
variances of normalization batches, weighted by their values, which is what an EMA estimates (Ioffe
& Szegedy, Sec. 3.1) and less by as much as the means of batches vary."""


class Estimate(NamedTuple):
    """Statistics of one layer; float64.

    Attributes:
        mean, var: shape (C,).
        num_batches: batches of the data loader in which the layer was used.
        mean_error: standard error of the mean in standard deviations of the values.
        var_error: standard error of the variance, relative to it. Of both the root mean square over
            channels; infinite after a single batch.
        population_var: by the estimator "population_variance", whichever was asked for.
    """

    mean: Tensor
    var: Tensor
    num_batches: int
    mean_error: float
    var_error: float
    population_var: Tensor

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.mean_error, self.var_error)


class _Sums(NamedTuple):
    """Sums over batches of n values with mean m, by channel; float64, shape (all channels,).

    m and e are taken about a pivot p, so that nothing cancels: d = m - p. For the population's
    variance e = var + d^2, for the mean of batch variances e is that of the batch.
    """

    count: Tensor  # type: ignore[assignment]  # in place of tuple.count, which nothing asks for
    mean: Tensor
    var: Tensor
    batches: Tensor
    pivot: Tensor
    n_e: Tensor
    nn: Tensor
    nn_d: Tensor
    nn_e: Tensor
    nn_dd: Tensor
    nn_ee: Tensor
    nn_de: Tensor


class Accumulator:
    """Sums over the batches of one process, of all layers at once.

    Args:
        channels: number of channels of each layer.
        estimator: one of ESTIMATORS.

    Attributes:
        sums: what :func:`estimates` takes, one from each process, shape (12, all channels).
    """

    def __init__(
        self, channels: Sequence[int], estimator: str, device: torch.device | None
    ) -> None:
        self.channels, self.estimator = list(channels), estimator
        self._repeats = torch.tensor(self.channels, device=device)
        self.sums = torch.zeros(len(_Sums._fields), sum(channels), device=device).double()

    def add(self, batches: Sequence[Sequence[Moments]]) -> list[bool]:
        """Take in one batch of the data loader.

        Args:
            batches: for each layer its normalization batches in the pass; none if it was not used.

        Returns:
            for each layer whether what it saw is finite. If not all is, nothing is taken in.
        """
        merged = [Moments.merge(of_layer) if of_layer else None for of_layer in batches]
        n, m, var = self._flat([(b.count, b.mean, b.var) if b else None for b in merged])
        finite = (m + var).isfinite()
        if not finite.all():
            return [bool(f.all()) for f in finite.split(self.channels)]
        s = _Sums(*self.sums)
        pivot = torch.where(s.batches == 0, m, s.pivot)
        d = m - pivot
        if self.estimator == "population_variance":
            e = var + d.square()
        else:
            layers = zip(merged, batches, strict=True)
            _, _, e = self._flat(
                [(b.count, *mean_statistics(of)) if b else None for b, of in layers]
            )
        count, mean, var = _merge([s[:3], (n, m, var)])
        nn = n.square()
        added = torch.stack([n * e, nn, nn * d, nn * e, nn * d * d, nn * e * e, nn * d * e])
        head = torch.stack([count, mean, var, s.batches + (n > 0), pivot])
        self.sums = torch.cat([head, self.sums[len(head) :] + added])
        return [True] * len(self.channels)

    def _flat(self, layers: Sequence[tuple[Tensor, Tensor, Tensor] | None]) -> list[Tensor]:
        """Count, mean and variance of each layer, zeros for None, joined; float64."""
        device = self.sums.device
        nothing = torch.zeros((), device=device)
        counts = [layer[0].to(device) if layer else nothing.double() for layer in layers]
        flat = [torch.stack(counts).repeat_interleave(self._repeats)]
        for field in (1, 2):
            parts = [
                layer[field].to(device) if layer else nothing.expand(channels)
                for layer, channels in zip(layers, self.channels, strict=True)
            ]
            flat.append(torch.cat(parts).double())
        return flat


def estimates(
    sums: Sequence[Tensor], channels: Sequence[int], estimator: str
) -> list[Estimate | None]:
    """The statistics of each layer from the sums of all processes; None if it was not used.

    A batch of the data loader is the sampling unit, as values in it are not independent. With
    second moment s = var + (m - mean)^2 (for the mean of batch variances: s that of the batch), the
    standard errors are those of ratios of sums over B batches: sqrt(sum n^2 (m - mean)^2) / sum n
    and sqrt(sum n^2 (s - var)^2) / sum n, times sqrt(B / (B - 1)).
    """
    ranks = [_Sums(*s) for s in sums]
    count, mean, population_var = _merge([s[:3] for s in ranks])
    var = population_var
    population = estimator == "population_variance"
    if not population:
        var = sum((s.n_e for s in ranks), torch.zeros_like(count)) / count.clamp(min=1)
    mean_square, var_square = torch.zeros_like(mean), torch.zeros_like(mean)
    for s in ranks:
        shift = mean - s.pivot
        mean_square += s.nn_dd - 2 * shift * s.nn_d + shift.square() * s.nn
        # s - var = e - a d + b
        a = 2 * shift if population else torch.zeros_like(shift)
        b = shift.square() - var if population else -var
        var_square += s.nn_ee + a.square() * s.nn_dd + b.square() * s.nn
        var_square += 2 * (b * s.nn_e - a * s.nn_de - a * b * s.nn_d)
    num = sum((s.batches for s in ranks), torch.zeros_like(count))
    scale = num / (num - 1) / count.square()
    mean_error = _relative(mean_square * scale, var)
    var_error = _relative(var_square * scale, var.square())
    fields = (
        f.split(list(channels)) for f in (num, mean, var, mean_error, var_error, population_var)
    )
    return [_estimate(*of_layer) for of_layer in zip(*fields, strict=True)]


def _relative(squares: Tensor, units: Tensor) -> Tensor:
    """Squared errors in squared units. A channel without variance has no error."""
    return torch.where(units > 0, squares.clamp(min=0) / units, 0.0)


def _estimate(
    num: Tensor,
    mean: Tensor,
    var: Tensor,
    mean_error: Tensor,
    var_error: Tensor,
    population_var: Tensor,
) -> Estimate | None:
    num_batches = int(num[0])
    if num_batches == 0:
        return None
    if num_batches == 1:
        return Estimate(mean, var, 1, math.inf, math.inf, population_var)
    of_mean, of_var = (float(squares.mean().sqrt()) for squares in (mean_error, var_error))
    return Estimate(mean, var, num_batches, of_mean, of_var, population_var)


def _merge(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Moments whose count is one for each channel."""
    merged = Moments.merge([Moments(n, m.unsqueeze(1), v.unsqueeze(1)) for n, m, v in parts])
    return merged.count, merged.mean.squeeze(1), merged.var.squeeze(1)
