"""The faults that benchmarks/doctor.py plants, each in three strengths.

They are those of users' reports that are in a checkpoint, or in the modules that it is loaded into.
Not here are those of a training that is running (ranks that wait for each other, gradients of
several batches, small normalization batches), of empty inputs, of kernels and of export.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from doctor_models import Healthy, Sample, State
from torch import Tensor, nn

from bn_det import freeze
from bn_det.layers.freeze import affine_of
from bn_det.layers.fuse import pairs
from bn_det.population.passes import surroundings

STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
ONE, THIRD, ALL = 0.0, 1 / 3, 1.0
"""Shares of the layers, one at least."""


class DoesNotApplyError(Exception):
    """The model has nothing that could have the fault."""


class Plant:
    """What a fault is planted into.

    Attributes:
        healthy: the model without it.
        state: of the file, which the fault changes.
        after: what it does to the model, in training mode, once the file has been loaded.
        layers: that have statistics, by name.
    """

    def __init__(self, healthy: Healthy, seed: int) -> None:
        self.healthy = healthy
        self.state = {name: value.clone() for name, value in healthy.state.items()}
        self.after: list[Callable[[nn.Module], Any]] = []
        self.layers = [n.rpartition(".")[0] for n in self.state if n.endswith(STATISTICS[0])]
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed

    def some(self, share: float, of: Sequence[str] | None = None) -> list[str]:
        """Layers at random; at least one."""
        of = self.layers if of is None else of
        if not of:
            raise DoesNotApplyError
        order = torch.randperm(len(of), generator=self.generator).tolist()
        chosen = sorted(order[: max(1, round(share * len(of)))])
        return [of[k] for k in chosen]

    def with_affine(self) -> list[str]:
        """Layers that have a weight and a bias of their own."""
        return [layer for layer in self.layers if f"{layer}.weight" in self.state]

    def mean(self, layer: str) -> Tensor:
        return self.state[f"{layer}.running_mean"]

    def var(self, layer: str) -> Tensor:
        return self.state[f"{layer}.running_var"]

    def put(self, layer: str, mean: Tensor | float, var: Tensor | float) -> None:
        """Other statistics, into the tensors that there are."""
        self.mean(layer)[:] = mean
        self.var(layer)[:] = var

    def signs(self, layer: str) -> Tensor:
        return 2.0 * torch.randint(2, self.mean(layer).shape, generator=self.generator) - 1

    def move_means(self, layers: Iterable[str], deviations: float) -> None:
        for layer in layers:
            self.mean(layer).add_(deviations * self.signs(layer) * self.var(layer).sqrt())

    def mix(self, other: State, share: float) -> None:
        """Statistics that are in part those of another state."""
        for layer in self.layers:
            for key in STATISTICS:
                name = f"{layer}.{key}"
                self.state[name].lerp_(other[name], share)

    def after_passes(
        self, batches: Iterable[list[Sample]], number: int, momentum: float | None
    ) -> State:
        """The state after passes in training mode; None for the mean of these passes alone."""
        model = self.healthy.make()
        model.load_state_dict(self.state)
        for norm in norms(model):
            norm.momentum = momentum
            if momentum is None:
                norm.reset_running_stats()
        model.train()
        with torch.no_grad(), surroundings():
            for _, batch in zip(range(number), batches, strict=False):
                self.healthy.kind.call(model, batch)
        return model.state_dict()


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def named(model: nn.Module, layers: Iterable[str]) -> list[Any]:
    modules = dict(model.named_modules())
    return [modules[layer] for layer in layers]


class Fault(NamedTuple):
    """Attributes:
    rules: any of these names it rightly.
    strengths: from weak to strong, as ``plant`` takes them.
    plant: changes what it is given.
    of_statistics: whether nothing but statistics is wrong, so that recomputing mends it.
    also: rules that are right about what follows from it.
    """

    rules: tuple[str, ...]
    strengths: tuple[Any, Any, Any]
    plant: Callable[[Plant, Any], None]
    of_statistics: bool
    also: tuple[str, ...]


FAULTS: dict[str, Fault] = {}
_STALE = "BN201", "BN301", "BN302"
"""What rightly says of any statistics that they do not fit."""


def _fault(
    *rules: str, strengths: tuple[Any, Any, Any], of_statistics: bool = True,
    also: tuple[str, ...] = _STALE,
) -> Callable[[Callable[[Plant, Any], None]], Callable[[Plant, Any], None]]:  # fmt: skip
    def register(plant: Callable[[Plant, Any], None]) -> Callable[[Plant, Any], None]:
        FAULTS[plant.__name__] = Fault(rules, strengths, plant, of_statistics, also)
        return plant

    return register


# --- statistics that do not fit the weights


@_fault(*_STALE, strengths=(0.1, 0.5, 2.0))
def means_moved(plant: Plant, deviations: float) -> None:
    """Of a third of the layers, up or down."""
    plant.move_means(plant.some(THIRD), deviations)


@_fault(*_STALE, strengths=(0.1, 0.5, 2.0))
def means_of_the_head_moved(plant: Plant, deviations: float) -> None:
    """Of the last quarter of the layers: training's RoIs are not those of test time."""
    plant.move_means(plant.layers[-(-3 * len(plant.layers) // 4) :], deviations)


@_fault(*_STALE, strengths=(1.2, 2.0, 8.0))
def variances_scaled(plant: Plant, factor: float) -> None:
    """Merged over processes without what lies between them, or weighted wrongly."""
    for layer in plant.some(THIRD):
        plant.var(layer).mul_(factor ** plant.signs(layer))


@_fault(*_STALE, strengths=(16, 4, 1))
def one_shard(plant: Plant, images: int) -> None:
    """Statistics of a few images alone, which one process has seen."""
    of = next(iter(plant.healthy.kind.batches(plant.seed)))
    more = next(iter(plant.healthy.kind.batches(plant.seed + 1)))
    # Twice the same where it is one image, as some layers see a single value of each.
    few = [(of + more)[:images] * (1 if images > 1 else 2)]
    plant.mix(plant.after_passes(few, 1, None), 1.0)


@_fault(*_STALE, strengths=(0.25, 0.5, 1.0))
def other_domain(plant: Plant, share: float) -> None:
    """Statistics of images at night, in part."""
    plant.mix(plant.after_passes(plant.healthy.kind.batches(plant.seed, "night"), 16, None), share)


@_fault(*_STALE, strengths=(1, 4, 16))
def probes(plant: Plant, number: int) -> None:
    """Forward passes in training mode, of noise for images."""
    batches = plant.healthy.kind.batches(plant.seed)
    generator = plant.generator

    def noise(of: Sample) -> Sample:
        image = torch.randint(256, of.image.shape, generator=generator, dtype=torch.uint8)
        return of._replace(image=image)

    noisy = ([noise(of) for of in batch] for batch in batches)
    plant.state = plant.after_passes(noisy, number, 0.1)


@_fault(*_STALE, strengths=(0, 1, 2))
def earlier_statistics(plant: Plant, index: int) -> None:
    """Those of a checkpoint before, under the weights of the end."""
    plant.mix(plant.healthy.earlier[index], 1.0)


@_fault(*_STALE, strengths=(0.25, 0.5, 0.75), of_statistics=False)
def averaged_weights(plant: Plant, share: float) -> None:
    """Parameters averaged with those of an earlier checkpoint; statistics are those of the end."""
    for name, value in plant.healthy.earlier[0].items():
        if name.endswith(("weight", "bias")):
            plant.state[name].lerp_(value, share)


@_fault(*_STALE, strengths=(ONE, THIRD, ALL))
def loaded_by_order(plant: Plant, share: float) -> None:
    """Statistics of layers of the same size, exchanged in pairs."""
    by_size: dict[int, list[str]] = {}
    for layer in plant.layers:
        by_size.setdefault(len(plant.mean(layer)), []).append(layer)
    couples = [p for of in by_size.values() for p in zip(of[::2], of[1::2], strict=False)]
    chosen = plant.some(share, [a for a, _ in couples])
    for a, b in couples:
        if a in chosen:
            for key in STATISTICS:
                left, right = plant.state[f"{a}.{key}"], plant.state[f"{b}.{key}"]
                plant.state[f"{a}.{key}"], plant.state[f"{b}.{key}"] = right, left


@_fault(*_STALE, strengths=(ONE, THIRD, ALL))
def channels_permuted(plant: Plant, share: float) -> None:
    """As after a conversion that orders channels otherwise."""
    for layer in plant.some(share):
        order = torch.randperm(len(plant.mean(layer)), generator=plant.generator)
        plant.put(layer, plant.mean(layer)[order], plant.var(layer)[order])


@_fault(*_STALE, strengths=(0.25, 0.5, 1.0), also=(*_STALE, "BN202"))
def levels_mixed(plant: Plant, share: float) -> None:
    """Each level gets statistics that are in part those of all levels."""
    levels: dict[str, list[str]] = {}
    for layer in plant.layers:
        if f"{layer}.weight" not in plant.state and re.search(r"\.\d+$", layer):
            levels.setdefault(layer.rpartition(".")[0], []).append(layer)
    if not levels:
        raise DoesNotApplyError
    for of in levels.values():
        means = torch.stack([plant.mean(layer) for layer in of])
        variances = torch.stack([plant.var(layer) for layer in of]) + (means - means.mean(0)) ** 2
        for layer in of:
            plant.mean(layer).lerp_(means.mean(0), share)
            plant.var(layer).lerp_(variances.mean(0), share)


@_fault(*_STALE, strengths=(0.05, 0.2, 0.6))
def small_momentum(plant: Plant, left: float) -> None:
    """A part of the start is left, after many batches."""
    for layer in plant.layers:
        plant.put(layer, plant.mean(layer) * (1 - left), plant.var(layer) * (1 - left) + left)


@_fault("BN106", strengths=(22, 10, 1))
def few_batches(plant: Plant, number: int) -> None:
    """Torch's momentum, and a counter that says how little has been seen."""
    small_momentum(plant, 0.9**number)
    for layer in plant.layers:
        plant.state[f"{layer}.{COUNTER}"].fill_(number)


# --- statistics of a new layer


@_fault("BN101", strengths=(ONE, THIRD, ALL))
def averaged_without_buffers(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        plant.put(layer, 0.0, 1.0)
        plant.state[f"{layer}.{COUNTER}"].fill_(0)


@_fault("BN104", strengths=(ONE, THIRD, ALL))
def never_moved(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        plant.put(layer, 0.0, 1.0)


@_fault("BN101", "BN113", strengths=(ONE, THIRD, ALL))
def left_out_of_the_file(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        for key in (*STATISTICS, COUNTER):
            del plant.state[f"{layer}.{key}"]


@_fault("BN113", strengths=(ONE, THIRD, ALL), also=(*_STALE, "BN104"))
def variances_left_out(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        del plant.state[f"{layer}.running_var"]


@_fault("BN105", strengths=(ONE, THIRD, ALL), of_statistics=False)
def new_layers(plant: Plant, share: float) -> None:
    for layer in plant.some(share, plant.with_affine()):
        plant.put(layer, 0.0, 1.0)
        plant.state[f"{layer}.{COUNTER}"].fill_(0)
        plant.state[f"{layer}.weight"].fill_(1)
        plant.state[f"{layer}.bias"].fill_(0)


@_fault("BN102", strengths=(ONE, THIRD, ALL), of_statistics=False, also=(*_STALE, "BN304"))
def frozen_from_scratch(plant: Plant, share: float) -> None:
    """Frozen layers that hold what new ones do, and have no counter."""
    layers = plant.some(share, plant.with_affine())
    for layer in layers:
        plant.put(layer, 0.0, 1.0)
        plant.state[f"{layer}.weight"].fill_(1)
        plant.state[f"{layer}.bias"].fill_(0)
        del plant.state[f"{layer}.{COUNTER}"]
    plant.after.append(lambda model: freeze(model, layers))


@_fault("BN103", strengths=(ONE, THIRD, ALL), of_statistics=False)
def folded(plant: Plant, share: float) -> None:
    """Inside weight and bias, in layers that are frozen: the same outputs."""
    layers = plant.some(share, plant.with_affine())
    eps = norms(plant.healthy.make())[0].eps
    for layer in layers:
        weight, bias = plant.state[f"{layer}.weight"], plant.state[f"{layer}.bias"]
        weight.div_((plant.var(layer) + eps).sqrt())
        bias.sub_(weight * plant.mean(layer))
        plant.put(layer, 0.0, 1.0 - eps)
        del plant.state[f"{layer}.{COUNTER}"]
    plant.after.append(lambda model: freeze(model, layers))


@_fault("BN114", strengths=(THIRD, 2 / 3, ALL), of_statistics=False,
        also=(*_STALE, "BN101", "BN105", "BN113"))  # fmt: skip
def fused_file(plant: Plant, share: float) -> None:
    """Loaded into the model that is not fused, whose convolutions have no bias."""
    model = plant.healthy.make()
    names = {module: name for name, module in model.named_modules()}
    found = {names[pair.norm]: (names[pair.conv], pair.norm.eps) for pair in pairs(model)}
    for layer in plant.some(share, [of for of in plant.with_affine() if of in found]):
        conv, eps = found[layer]
        scale = plant.state[f"{layer}.weight"] / (plant.var(layer) + eps).sqrt()
        bias = plant.state.get(f"{conv}.bias", 0.0) - plant.mean(layer)
        plant.state[f"{conv}.bias"] = bias * scale + plant.state[f"{layer}.bias"]
        plant.state[f"{conv}.weight"].mul_(scale.reshape(-1, 1, 1, 1))
        for key in (*STATISTICS, COUNTER, "weight", "bias"):
            del plant.state[f"{layer}.{key}"]


# --- values of channels


def _first_channel(plant: Plant, share: float, change: Callable[[Tensor], Tensor | float]) -> None:
    for layer in plant.some(share):
        var = plant.var(layer)
        channel = int(torch.randint(len(var), (), generator=plant.generator))
        var[channel] = change(var[channel])


@_fault("BN107", strengths=(ONE, THIRD, ALL))
def not_a_number(plant: Plant, share: float) -> None:
    """In a channel."""
    _first_channel(plant, share, lambda _: math.nan)


@_fault("BN107", strengths=(ONE, THIRD, ALL))
def infinite(plant: Plant, share: float) -> None:
    """In a channel."""
    _first_channel(plant, share, lambda _: math.inf)


@_fault("BN108", strengths=(ONE, THIRD, ALL))
def negative(plant: Plant, share: float) -> None:
    """In a channel."""
    _first_channel(plant, share, lambda var: -var)


@_fault("BN109", strengths=(ONE, THIRD, ALL))
def clamped(plant: Plant, share: float) -> None:
    """In a channel, at float16's largest number."""
    _first_channel(plant, share, lambda _: 65504.0)


@_fault("BN115", strengths=(ONE, THIRD, ALL))
def half_precision(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        for key in STATISTICS:
            plant.state[f"{layer}.{key}"] = plant.state[f"{layer}.{key}"].half()


# --- counters, which cost nothing


@_fault("BN112", strengths=(ONE, THIRD, 0.45))
def counters_doubled(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        plant.state[f"{layer}.{COUNTER}"].mul_(2)


@_fault("BN112", strengths=(ONE, THIRD, 0.45))
def one_pass_more(plant: Plant, share: float) -> None:
    for layer in plant.some(share):
        plant.state[f"{layer}.{COUNTER}"].add_(1)


# --- of the modules


@_fault("BN110", "BN404", strengths=(1e-4, 1e-3, 1e-1), of_statistics=False)
def other_eps(plant: Plant, eps: float) -> None:
    """In all layers: that of another framework, or a mistake."""

    def after(model: nn.Module) -> None:
        for norm in norms(model):
            norm.eps = eps

    plant.after.append(after)


@_fault("BN404", strengths=(1e-4, 1e-3, 1e-1), of_statistics=False, also=(*_STALE, "BN110"))
def mixed_eps(plant: Plant, eps: float) -> None:
    """In a third of the layers."""
    layers = plant.some(THIRD)

    def after(model: nn.Module) -> None:
        for norm in named(model, layers):
            norm.eps = eps

    plant.after.append(after)


@_fault("BN403", strengths=(0.5, 0.9, 0.99))
def decay_for_a_momentum(plant: Plant, momentum: float) -> None:
    """Statistics of nearly the last batch alone."""
    plant.state = plant.after_passes(plant.healthy.kind.batches(plant.seed), 12, momentum)

    def after(model: nn.Module) -> None:
        for norm in norms(model):
            norm.momentum = momentum

    plant.after.append(after)


@_fault("BN401", strengths=(1, 8, 32))
def frozen_by_half(plant: Plant, number: int) -> None:
    """Weight and bias need no gradient, and other images have moved the statistics."""
    plant.state = plant.after_passes(plant.healthy.kind.batches(plant.seed, "night"), number, 0.1)

    def after(model: nn.Module) -> None:
        for parameter in affine_of(model, norms(model)):
            parameter.requires_grad_(False)

    plant.after.append(after)


@_fault("BN402", strengths=(THIRD, 2 / 3, ALL), also=(*_STALE, "BN112", "BN401"))
def mode_of_an_evaluation(plant: Plant, share: float) -> None:
    """Layers left in evaluation mode early, whose statistics stand since then."""
    layers = plant.some(share)
    earlier = plant.healthy.earlier[-1]
    for layer in layers:
        for key in (*STATISTICS, COUNTER):
            plant.state[f"{layer}.{key}"] = earlier[f"{layer}.{key}"].clone()

    def after(model: nn.Module) -> None:
        for norm in named(model, layers):
            norm.eval()

    plant.after.append(after)


def planted(name: str, strength: int, healthy: Healthy, seed: int) -> Plant:
    """A fault by name; strength 0, 1 or 2.

    Raises:
        DoesNotApplyError: the model has nothing that could have it.
    """
    plant = Plant(healthy, seed)
    FAULTS[name].plant(plant, FAULTS[name].strengths[strength])
    return plant
