"""What can be told from passes over the images that a model is to be used on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..population.estimate import Estimate
from .chance import bound_of
from .findings import Finding, Recompute, Shift, furthest
from .from_passes import Seen


def shifts(source: Seen, target: Seen) -> list[Shift]:
    """How far the statistics of each layer on target images are from those on source images.

    Both are of the model as it runs in training: layers that are not frozen normalize by their
    batch. Chance is the standard errors of both.
    """
    names = [name for name in source.estimates if name in target.estimates]
    tests = 2 * max(len(names), 1)
    return [_shift(name, source.estimates[name], target.estimates[name], tests) for name in names]


def _shift(name: str, source: Estimate, target: Estimate, num_tests: int) -> Shift:
    bound = bound_of(min(source.num_batches, target.num_batches), num_tests)
    chances = (
        (source.mean_error**2 + target.mean_error**2) ** 0.5,
        (source.var_error**2 + target.var_error**2) ** 0.5,
    )
    mean = _size(target.mean - source.mean, source.var.sqrt())
    return Shift(name, mean, _size(target.var - source.var, source.var), *chances, bound)


def _size(off: Tensor, unit: Tensor) -> float:
    """Root mean square over channels; one without variance counts as 0."""
    return float(torch.where(unit > 0, off / unit, 0.0).square().mean().sqrt())


def findings_of(
    found: Sequence[Shift], frozen: set[str], recompute: Recompute
) -> Iterator[Finding]:
    """BN205.

    Args:
        frozen: names of layers whose statistics training leaves alone.
    """
    off = {of.name: of.worst for of in found if of.worst}
    if not off:
        return
    names, shift, error = furthest(off)
    why = (
        f"on the target's images {len(off)} of {len(found)} layers have other statistics than on "
        f"the source's, {names[0]} by {shift:.3g} (standard deviations of the mean, or relative to "
        f"the variance), where chance would be {error:.2g}; the first that differs is "
        f"{next(of.name for of in found if of.worst)}"
    )
    if held := len(frozen & off.keys()):
        why += f"; {held} of them are frozen"
    treatment = f"{recompute.adapt} takes the target's statistics (AdaBN)"
    yield Finding("BN205", "warning", names, shift, why, treatment, error)
