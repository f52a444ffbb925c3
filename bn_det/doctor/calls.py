"""What layers see in passes in training mode, call by call and source by source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import DomainBatchNorm2d
from ..layers.moments import Moments
from ..layers.sources import named_sources
from ..population.observation import Observed, Observer, PopulationLayer
from ..population.report import LayerReport
from .shares import between_sources, stacked


class SourceShare(NamedTuple):
    """Attributes:
    sources: their number.
    share: of a layer's variance, what lies between them.
    error: its standard error.
    is_mixed: whether any batch was of several.
    passes: in which the layer has seen some.
    """

    sources: int
    share: float
    error: float
    is_mixed: bool
    passes: int


class CallObserver(Observer):
    """Also keeps what layers see in each call, and of each source of images.

    Attributes:
        batches: of each layer that has several normalization batches a pass, these of each pass.
        sources: of each layer, in each pass, what it sees of each source.
    """

    def __init__(
        self, call: Callable[[Any], Any], model: nn.Module, layers: Sequence[PopulationLayer]
    ) -> None:
        super().__init__(call, model, layers, thaw=False)
        self.batches: dict[str, list[list[Moments]]] = {}
        self.sources: dict[str, list[dict[int, list[Moments]]]] = {}

    def run(self, inputs: Any, observed: Observed) -> None:
        super().run(inputs, observed)
        for layer, batches in zip(self.layers, observed.batches, strict=True):
            if len(batches) > 1:
                self.batches.setdefault(layer.name, []).append(batches)

    def _install(self, *args: Any) -> None:
        super()._install(*args)
        for layer in self.layers:
            if not isinstance(layer.owner, DomainBatchNorm2d):
                passes = self.sources.setdefault(layer.name, [])
                passes.append({})
                layer.owner.register_forward_pre_hook(partial(_take_by_source, passes[-1]))

    def levels(self) -> dict[str, list[list[Moments]]]:
        """Of layers whose batches share statistics, and differ in what they are of: these batches.

        Of each pass that has as many of them as is usual; two passes at least.
        """
        found = {}
        for layer in self.layers:
            passes = self.batches.get(layer.name, [])
            if len(layer.domains) == 1:
                # Not several normalization batches of one call, which differ by chance alone.
                usual = (self._usual_calls or {}).get(layer.owner)
            else:
                usual = mode(map(len, passes)) if passes and _are_apart(layer.owner) else None
            passes = [of for of in passes if len(of) == usual]
            if len(passes) > 1:
                found[layer.name] = passes
        return found

    def shares_of_sources(self) -> dict[str, SourceShare]:
        """Of layers that have seen each of several sources in two passes at least."""
        found = {}
        for name, passes in self.sources.items():
            numbers = Counter(source for of in passes for source in of)
            known = sorted(source for source, number in numbers.items() if number > 1)
            merged = [[Moments.merge(of[k]) if k in of else None for k in known] for of in passes]
            seen = [of for of in merged if any(of)]
            if len(known) > 1:
                is_mixed = any(sum(m is not None for m in of) > 1 for of in seen)
                found[name] = SourceShare(len(known), *between_sources(seen), is_mixed, len(seen))
        return found

    def noise(self, of: LayerReport) -> float:
        """By how much the mean of a normalization batch varies, in standard deviations."""
        passes = self.batches.get(of.name, [])
        if len(passes) < 2:
            return of.mean_error * math.sqrt(of.num_batches)
        fewest = min(map(len, passes))
        counts, means, variances = stacked([batches[:fewest] for batches in passes])
        unbiased = counts / (counts - 1).clamp(min=1)
        var = (unbiased.unsqueeze(2) * variances).mean(0)
        ratios = torch.where(var > 0, means.var(0) / var, 0.0)
        return float(ratios.mean(1).max().sqrt())

    def calls(self, name: str) -> int:
        """The normalization batches that a layer has in a pass, at most."""
        return max(map(len, self.batches.get(name, [])), default=1)

    def parts_a_pass(self, layer: PopulationLayer) -> int:
        """In how many parts, calls and domains, its samples come."""
        calls = self._usual_calls[layer.owner] if self._usual_calls else 1
        return max(calls, 1) * len(layer.domains)


def of_each(passes: Sequence[Sequence[Moments]]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each of several batches a pass, over all passes."""
    merged = [Moments.merge(of_one) for of_one in zip(*passes, strict=True)]
    return [(of.mean.double(), of.var.double()) for of in merged]


def _are_apart(owner: nn.Module) -> bool:
    """Whether each domain of a layer is a normalization batch by itself, in training."""
    return owner.statistics == "per_domain" and owner.ghost_size is None


def _take_by_source(seen: dict[int, list[Moments]], _: nn.Module, inputs: tuple) -> None:
    """For a layer whose samples are the images, of sources that are named."""
    sources = named_sources()
    known = sorted({source for source in sources if source is not None})
    if not known or not torch.is_tensor(inputs[0]) or len(inputs[0]) != len(sources):
        return
    for source in known:
        of_source = torch.tensor([k for k, s in enumerate(sources) if s == source])
        x = inputs[0][of_source.to(inputs[0].device)]
        if x.numel():
            seen.setdefault(source, []).append(Moments.of(x))
