"""Forward passes of a model, and the normalization batches that its layers see in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrize import is_parametrized

from ..layers.batch import Batch
from ..layers.batch_norm import BatchNorm2d
from ..layers.become import class_of
from ..layers.comm import process_group
from ..layers.domain_batch_norm import DomainBatchNorm2d, holders_of_domains, state_holders
from ..layers.forward import Domain, Observation, Plan, batch_norm
from ..layers.freeze import is_frozen, thaw_statistics
from ..layers.frozen import FrozenBatchNorm, StaysInEvaluation
from ..layers.kept import kept_in_evaluation
from ..layers.kinds import (
    FORWARDS_OF_TORCH,
    batch_norms,
    eps_of,
    is_host_frozen,
    what_else,
    why_lazy,
)
from ..layers.l1_batch_norm import L1BatchNorm2d
from ..layers.moments import Moments
from ..layers.shuffle import is_shuffled
from ..layers.types import AnyBatchNorm, WithStatistics, has_statistics

logger = logging.getLogger(__name__)


class PopulationLayer(NamedTuple):
    """A place of population statistics: a BatchNorm layer, or one of a layer's domains.

    Attributes:
        name: of the module that holds them.
        module: that module.
        owner: the module that is called: the same, or the DomainBatchNorm2d that it is a part of.
        domains: the positions of its domains in the list that the owner is called with.
    """

    name: str
    module: WithStatistics
    owner: AnyBatchNorm
    domains: list[int]


def population_layers(model: nn.Module, frozen: bool = False) -> list[PopulationLayer]:
    """The places of population statistics that training updates: those in training mode.

    Not those of L1BatchNorm2d, which are an EMA of something else than mean and variance, nor those
    of frozen layers that do more than normalize and never were a BatchNorm (timm's).

    Args:
        frozen: whether those of frozen layers count, too, in whatever mode they are.
    """
    places = places_of(model, batch_norms(model))
    return [place for place in places if _is_updated(place, frozen)]


def left_out(model: nn.Module, layers: Sequence[PopulationLayer]) -> dict[str, str]:
    """The BatchNorm layers of a model that are not among some, each with what is the matter."""
    owners = {layer.owner for layer in layers}
    kept = kept_in_evaluation(model)
    return {
        name: _KEPT if layer in kept else _why_left(layer)
        for layer, name in batch_norms(model).items()
        if layer not in owners
    }


_KEPT = "kept in evaluation mode by a train() of the model's own (frozen=True updates them)"


def _why_left(layer: AnyBatchNorm) -> str:
    if why := why_lazy(layer):
        return why
    if is_l1(layer):
        return "of mean absolute deviations, which are no variances"
    if is_host_frozen(layer) and (what := what_else(layer)):
        return f"frozen, and {what}"
    if is_frozen(layer):
        return "frozen (frozen=True updates them)"
    if not all(has_statistics(population) for population, _ in state_holders(layer)):
        return "without population statistics"
    if not layer.training:
        return "in evaluation mode (call train() before)"
    if _are_computed(layer):
        return "with statistics that are parametrized"
    return "with statistics that are off (track_running_stats False)"


def is_l1(layer: nn.Module) -> bool:
    """Whether a layer keeps mean absolute deviations, frozen or not."""
    return issubclass(getattr(layer, "thawed_type", type(layer)), L1BatchNorm2d)


def places_of(model: nn.Module, owners: Iterable[AnyBatchNorm]) -> list[PopulationLayer]:
    """Every place of population statistics of some layers of a model."""
    names = {module: name for name, module in model.named_modules()}
    places = []
    for owner in owners:
        domains: dict[AnyBatchNorm, list[int]] = {}
        for k, (population, _) in enumerate(holders_of_domains(owner)):
            domains.setdefault(population, []).append(k)
        places += [
            PopulationLayer(names[m], m, owner, of)
            for m, of in domains.items()
            if has_statistics(m)
        ]
    return places


def places_with_statistics(model: nn.Module) -> list[PopulationLayer]:
    """Those of all BatchNorm of a model, frozen or not: the same whatever the modes are."""
    return places_of(model, [m for m in batch_norms(model) if not (is_l1(m) or why_lazy(m))])


def _is_updated(layer: PopulationLayer, frozen: bool) -> bool:
    module = layer.module
    if is_l1(module) or why_lazy(layer.owner) or _are_computed(module):
        return False
    if is_frozen(layer.owner):
        return frozen and not (is_host_frozen(module) and what_else(module))
    if not (layer.owner.training and module.training):
        return False
    return bool(getattr(module, "track_running_stats", False))


def _are_computed(module: nn.Module) -> bool:
    """Whether statistics are parametrized: what would be written to is another tensor each time."""
    return is_parametrized(module, "running_mean") or is_parametrized(module, "running_var")


class Observed(NamedTuple):
    """What the layers have seen in one forward pass.

    Attributes:
        batches: for each layer its normalization batches, without empty ones.
        samples: for each layer the number of samples of this process.
    """

    batches: list[list[Moments]]
    samples: list[int]


class Observer:
    """Runs a model as in training, but that its population statistics stay as they are.

    Frozen layers among those that are looked at normalize by their batch, as others do, if they are
    to thaw.

    What the layers of a model do is changed while it runs, by observers of ours and by attributes
    of the instances; putting the attributes back, the observers among them, is the caller's part,
    also after a failure.

    A pass ends where the last layer is done, if the rest of the model has none: once each layer
    has been called as often as it was before. How often that is, is found in passes that run to
    their end: the 1st, 2nd, 4th, 8th and so on. Where it varies, or where a layer has not been
    called, every pass runs to its end.

    Args:
        call: runs the model on a batch.
        by_batch: whether the layers normalize by their batch, or else by their population
            statistics.
        thaw: whether frozen layers among them do so, too, or else by their population statistics.

    Attributes:
        in_step: whether the processes have to run passes at the same time, as the model exchanges
            something in them.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        model: nn.Module,
        layers: Sequence[PopulationLayer],
        by_batch: bool = True,
        thaw: bool = True,
    ) -> None:
        self.call, self.model, self.layers = call, model, layers
        self._by_population = {
            layer.owner for layer in layers if not by_batch or (not thaw and is_frozen(layer.owner))
        }
        alone = {part for owner in self._by_population for part in owner.modules()}
        self.in_step = any(_exchanges(module) for module in model.modules() if module not in alone)
        self._num_passes = 0
        self._owners = list(dict.fromkeys(layer.owner for layer in layers))
        self._known = {layer.module for layer in layers if _is_known(layer.module)}
        self._usual_calls: dict[AnyBatchNorm, int] | None = None
        self._calls_vary = False
        self._in_order: dict[AnyBatchNorm, None] = {}

    def run(self, inputs: Any, observed: Observed) -> None:
        """Call the model with the inputs, and fill in what its layers see."""
        self._num_passes += 1
        is_whole = self._num_passes & (self._num_passes - 1) == 0
        stop_at = None if is_whole or self._calls_vary else self._usual_calls
        calls = dict.fromkeys(self._owners, 0)
        self._install(observed, calls, stop_at)
        with suppress(_Done):
            self.call(inputs)
        if self._usual_calls is None:
            self._usual_calls = calls
            self._calls_vary = 0 in calls.values()
        elif calls != self._usual_calls and not self._calls_vary:
            self._calls_vary = True
            logger.warning(
                "Layers are called more often in some batches than in others: passes that ended "
                "with the usual last call may have missed some values"
            )

    def by_first_call(self) -> list[str]:
        """The names of all layers in the order in which they were first called on this rank.

        Those that no pass called come last.
        """
        names: dict[AnyBatchNorm, list[str]] = {owner: [] for owner in self._in_order}
        for layer in self.layers:
            names.setdefault(layer.owner, []).append(layer.name)
        return [name for of_owner in names.values() for name in of_owner]

    def was_called(self, layer: PopulationLayer) -> bool:
        """Whether any pass has called a layer on this rank, be it with nothing."""
        return layer.owner in self._in_order

    def watch(self, observed: Observed) -> None:
        """Have the layers fill in what they see in a pass that the caller runs to its end."""
        self._install(observed, dict.fromkeys(self._owners, 0), None)

    def _install(
        self,
        observed: Observed,
        calls: dict[AnyBatchNorm, int],
        stop_at: dict[AnyBatchNorm, int] | None,
    ) -> None:
        for owner in self._owners:
            self._prepare(owner)
        for layer, seen in zip(self.layers, observed.batches, strict=True):
            by_batch = layer.owner not in self._by_population
            # What does not normalize by its batch sees those of its own process.
            group = _group_of(layer.owner) if by_batch else None
            take = partial(_take, layer, seen, group)
            if isinstance(layer.owner, BatchNorm2d):
                layer.owner.register_observer(take)
            elif layer.module in self._known:
                layer.module.forward = partial(_forward, layer, take, by_batch, group)
            else:
                layer.module.register_forward_pre_hook(partial(_take_input, take))
                continue
            vars(layer.module)["track_running_stats"] = False
        of_owner: dict[AnyBatchNorm, list] = {owner: [] for owner in self._owners}
        for index, layer in enumerate(self.layers):
            of_owner[layer.owner].append((index, layer.domains))
        for owner, parts in of_owner.items():
            if isinstance(owner, DomainBatchNorm2d) and owner.population == "per_domain":
                # Statistics fit what test time does with them only if they are estimated so, too.
                owner.statistics = "per_domain"
            counted = observed.samples, calls, self._in_order
            after = partial(_after_call, parts, *counted, stop_at)
            owner.register_forward_hook(after, with_kwargs=True)

    def _prepare(self, owner: AnyBatchNorm) -> None:
        """Have a layer normalize by what it is to, for a pass."""
        by_batch = owner not in self._by_population
        if isinstance(owner, FrozenBatchNorm) and issubclass(owner.thawed_type, BatchNorm2d):
            thaw_statistics(owner)
            vars(owner)["frozen"] = True  # as it has another class now
        if isinstance(owner, StaysInEvaluation):
            owner.training = by_batch
            vars(owner)["track_running_stats"] = False
        elif isinstance(owner, BatchNorm2d):
            if owner.frozen or not by_batch:  # ranks do not expect it to exchange anything
                owner.group = None
            for part in owner.modules():
                if isinstance(part, BatchNorm2d):
                    part.training, part.frozen = part.training or part.frozen, False
            if not by_batch:
                owner.train_statistics = "population"
        elif not by_batch:
            owner.training = False


class _Done(BaseException):
    """Leaves a forward pass; no Exception, so that no model takes it for one."""


_USUAL_FORWARDS = (*FORWARDS_OF_TORCH, FrozenBatchNorm.forward)
"""Of torch's own layers, for one dimension or more, and of what these become if they are frozen."""


def _is_known(module: nn.Module) -> bool:
    """Whether a layer that is not ours only normalizes."""
    if is_host_frozen(module):
        return not what_else(module)
    return _has_usual_forward(module)


def _has_usual_forward(module: nn.Module) -> bool:
    """Whether it is torch's, and nobody has given this one module another."""
    return "forward" not in vars(module) and class_of(module).forward in _USUAL_FORWARDS


def _take(
    layer: PopulationLayer,
    seen: list[Moments],
    group: dist.ProcessGroup | None,
    population: AnyBatchNorm,
    batches: Sequence[Batch],
) -> None:
    # Batches of several processes are seen by each of them, and count once.
    if population is layer.module and (group is None or dist.get_rank(group) == 0):
        seen += [b.moments for b in batches if b.size > 0]


def _take_input(take: Observation, module: AnyBatchNorm, inputs: tuple) -> None:
    """For a layer that does we know not what: all values of the call as one batch."""
    x = inputs[0]
    if x.numel():
        take(module, [Batch(Moments.of(x), x.numel() // x.shape[1])])


def _forward(
    layer: PopulationLayer,
    take: Observation,
    by_batch: bool,
    group: dist.ProcessGroup | None,
    x: Tensor,
) -> Tensor:
    """What a BatchNorm of torch computes in its mode; it need not update an EMA for that."""
    bn = layer.module
    if isinstance(bn, _NormBase):
        bn._check_input_dim(x)
    domains = [Domain(x, bn, bn, name=layer.name)]
    by_batch = by_batch and (bn.training or is_frozen(bn))
    plan = Plan(domains, eps_of(bn), by_batch, group, observers=[take])
    return batch_norm(plan)[0]


def _after_call(
    parts: list[tuple[int, list[int]]],
    samples: list[int],
    calls: dict[AnyBatchNorm, int],
    in_order: dict[AnyBatchNorm, None],
    stop_at: dict[AnyBatchNorm, int] | None,
    owner: AnyBatchNorm,
    args: tuple,
    kwargs: dict[str, Any],
    _: Any,
) -> None:
    x = args[0] if args else next(v for name, v in kwargs.items() if name != "groups")
    sizes = owner.num_samples(x) if isinstance(owner, DomainBatchNorm2d) else [len(x)]
    for index, domains in parts:
        samples[index] += sum(sizes[k] for k in domains)
    calls[owner] += 1
    in_order.setdefault(owner)
    if stop_at is not None and all(n >= stop_at[o] for o, n in calls.items()):
        raise _Done


def _group_of(owner: nn.Module) -> dist.ProcessGroup | None:
    if is_frozen(owner):
        return None
    if isinstance(owner, nn.SyncBatchNorm):
        return process_group(owner.process_group or "world")
    return process_group(getattr(owner, "group", None))


def _exchanges(module: nn.Module) -> bool:
    """Whether a module may exchange something between processes in a forward pass of training."""
    if not module.training:
        return False
    if isinstance(module, _BatchNorm):
        known = isinstance(module, BatchNorm2d) or _has_usual_forward(module)
        return not known or _group_of(module) is not None
    return is_shuffled(module)
