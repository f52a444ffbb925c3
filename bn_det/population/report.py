"""What a recomputation of population statistics has done, for people and programs to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import first_of
from ..files import finite
from .estimate import Estimate
from .observation import PopulationLayer


class LayerReport(NamedTuple):
    """Of one layer, or of one domain of a layer. The last four are root mean squares over channels.

    Attributes:
        name: of the module that holds the statistics.
        num_batches: batches of the data loader, of all ranks.
        num_samples: samples (images; RoIs in a RoI head) of all ranks.
        mean_error, var_error: standard errors, of the mean in standard deviations and of the
            variance relative to it.
        mean_shift, var_shift: how far the old statistics (of this rank) were from the new ones, in
            the same units: how stale they were.
    """

    name: str
    num_batches: int
    num_samples: int
    mean_error: float
    var_error: float
    mean_shift: float
    var_shift: float


class PopulationReport(NamedTuple):
    """Prints as a table.

    Attributes:
        layers: those whose statistics have been recomputed.
        unused: names of those that were in no pass, and are as they were.
        left: names of all other BatchNorm layers, which are as they were, too, with reasons.
        reason: why it stopped: "num_iters", "tolerance", "end of data", or "no layers".
        last_layer: the layer that was the last to be as precise as the tolerance asks; without
            one, or where it was not reached, the least precise layer.
    """

    layers: list[LayerReport]
    unused: list[str]
    left: dict[str, str]
    reason: str
    last_layer: str

    @property
    def num_batches(self) -> int:
        """Batches of the data loader, of all ranks."""
        return max((layer.num_batches for layer in self.layers), default=0)

    @property
    def num_samples(self) -> int:
        """Samples that every layer has seen at least, images as a rule."""
        return min((layer.num_samples for layer in self.layers), default=0)

    @property
    def error(self) -> float:
        """The largest standard error of a layer."""
        return max((max(of.mean_error, of.var_error) for of in self.layers), default=0.0)

    @property
    def furthest(self) -> list[LayerReport]:
        """The layers whose old statistics were furthest from the new ones, three at most."""
        by_shift = sorted(self.layers, key=lambda of: -max(of.mean_shift, of.var_shift))
        return by_shift[:_NUM_FURTHEST]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: the errors after a single batch are None."""
        summary = {
            "num_batches": self.num_batches,
            "num_samples": self.num_samples,
            "error": finite(self.error),
            "reason": self.reason,
            "last_layer": self.last_layer,
            "furthest": [of.name for of in self.furthest],
            "unused": self.unused,
            "left": self.left,
        }
        layers = [finite(of._asdict()) for of in self.layers]
        return {**summary, "layers": layers}

    def __str__(self) -> str:
        lines = [self._table(), self._summary()] if self.layers else ["No layer has been used"]
        if self.unused:
            lines.append(f"Not used, left as they were: {', '.join(self.unused)}")
        for why in dict.fromkeys(self.left.values()):
            names = [name for name, reason in self.left.items() if reason == why]
            lines.append(f"Left as they were: {first_of(names)}: {why}")
        return "\n".join(lines)

    def _table(self) -> str:
        from tabulate import tabulate  # not before a report is read: the layers need torch alone

        return tabulate(
            [[of.name, of.num_batches, of.num_samples, *of[3:]] for of in self.layers],
            headers=[
                "layer",
                "batches",
                "samples",
                "error of mean",
                "error of variance",
                "shift of mean",
                "shift of variance",
            ],
            tablefmt="pipe",
            floatfmt=".4f",
            disable_numparse=[0],
        )

    def _summary(self) -> str:
        return (
            f"{self.num_batches} batches, {self.num_samples} samples; stopped by {self.reason}; "
            f"largest standard error {self.error:.4f}, last layer {self.last_layer}\n"
            f"Furthest from the new ones: {'; '.join(map(_how_far, self.furthest))}"
        )


_NUM_FURTHEST = 3


def _how_far(of: LayerReport) -> str:
    return (
        f"{of.name} (mean by {of.mean_shift:.2g} standard deviations, variance by "
        f"{100 * of.var_shift:.2g} %)"
    )


def make_report(
    layers: Sequence[PopulationLayer],
    found: Sequence[Estimate | None],
    num_samples: Sequence[int],
    left: dict[str, str],
    reason: str,
    last_layer: str,
) -> PopulationReport:
    """From what has been found for each layer, before it is written.

    Args:
        left: the other layers, with reasons.
    """
    reports, unused = [], []
    for layer, estimate, samples in zip(layers, found, num_samples, strict=True):
        if estimate is None:
            unused.append(layer.name)
            continue
        old_mean, old_var = (
            b.to(estimate.mean) for b in (layer.module.running_mean, layer.module.running_var)
        )
        reports.append(
            LayerReport(
                layer.name,
                estimate.num_batches,
                samples,
                estimate.mean_error,
                estimate.var_error,
                shift_of(old_mean, estimate.mean, estimate.var.sqrt()),
                shift_of(old_var, estimate.var, estimate.var),
            )
        )
    return PopulationReport(reports, unused, left, reason, last_layer)


def shift_of(old: Tensor, new: Tensor, unit: Tensor) -> float:
    """Root mean square over channels of old - new in units; infinite if an old value is not finite.

    A channel without variance, where nothing is relative to it, counts as zero.
    """
    shifts = torch.where(unit > 0, (old - new) / unit, 0.0)
    return float(torch.where(old.isfinite(), shifts, torch.inf).square().mean().sqrt())
