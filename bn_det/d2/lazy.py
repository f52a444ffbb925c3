"""What Detectron2's LazyConfig files need of us: norms and optimizers, as nodes of a config.

``configs/common`` has such nodes, and the .py files beside the YAML ones build on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError, nearest
from ..layers import (
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    norm_factory,
)
from ..layers.norms import NormFactory
from ..layers.renorm import RenormLimits
from ..population.snapshot import same_random_state
from ..training.accumulate import GradientAccumulation
from ..training.agc import AdaptiveGradientClipping
from .norms import NORMS


def make_norm(
    name: str = "BN",
    *,
    num_levels: int | None = None,
    num_roi_levels: int | None = None,
    ghost_size: int = 0,
    ghost_order: str = "contiguous",
    renorm: Sequence[float] = RenormLimits(),
    statistics: str | None = None,
    population: str | None = None,
    affine: str | None = None,
    **choices: Any,
) -> NormFactory | str:
    """The ``norm`` of Detectron2's components, by the choices that MODEL.<part> has in YAML.

    Args:
        name: as MODEL.<part>.NORM.
        num_levels: in a head that runs layer by layer over all levels, their number; the choices
            of :class:`~bn_det.DomainBatchNorm2d` then apply.
        num_roi_levels: in the box heads of ``BNCascadeROIHeads``, the number of levels that RoIs
            come from, where the choices of :class:`~bn_det.RoILevelBatchNorm2d` are to apply.
        ghost_size, ghost_order, renorm: as in ``norm_factory``.
        statistics, population, affine: what levels share, "shared" or "per_domain"; by default
            affine alone.
        choices: of :class:`~bn_det.BatchNorm2d`, such as ``update_population``.

    Returns:
        a callable from the number of channels to the layer, or "" for none.

    Raises:
        InputError: the name is unknown; "GhostBN" has no size; or what levels share is said where
            there is no number of them.
    """
    given: dict[str, Any] = {"statistics": statistics, "population": population, "affine": affine}
    given = {name: value for name, value in given.items() if value is not None}
    layer: NormFactory = partial(BatchNorm2d, **choices)
    others: Mapping[str, NormFactory] = NORMS
    num_domains = num_roi_levels if num_levels is None else num_levels
    if num_domains is not None:
        kind = RoILevelBatchNorm2d if num_levels is None else DomainBatchNorm2d
        layer = partial(kind, num_domains=num_domains, **given, **choices)
    elif given:
        key, value = next(iter(given.items()))
        raise InputError(
            f"norm.{key}: {value!r} is not accepted without norm.num_levels (in a box head "
            "norm.num_roi_levels), the number of levels that it is about"
        )
    if num_levels is not None:
        others = {**NORMS, "L1BN": partial(L1BatchNorm2d.of_levels, num_levels=num_levels)}
    norm = norm_factory(
        name,
        layer,
        others,
        "norm.name",
        ghost_key="norm.ghost_size",
        ghost_size=ghost_size,
        ghost_order=ghost_order,
        renorm=tuple(renorm),
    )
    return norm or ""


def build_optimizer(
    params: Any,
    *,
    model: nn.Module,
    max_iter: int,
    kind: str | Callable[..., Optimizer] = torch.optim.SGD,
    hooks: Sequence[str] = (),
    hook_nodes: Mapping[str, Any] | None = None,
    agc: Mapping[str, Any] | None = None,
    accumulate: int = 1,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer that brings along what a training has beside it.

    ``tools/lazyconfig_train_net.py`` has a fixed list of hooks and steps once in each iteration;
    but it takes any optimizer. With this one, hooks run around each step (:class:`StepHooks`), and
    gradients are clipped or accumulated before it, also with mixed precision.

    Args:
        params: what is optimized, as torch's optimizers take it.
        model: that the hooks and the clipping are about.
        max_iter: the number of iterations.
        kind: the class of the optimizer, or its full name.
        hooks: the names, among those of ``hook_nodes``, of what runs, in this order.
        hook_nodes: hooks, or nodes of a config that they are made of. They are made here, and leave
            the random numbers of the training as they are.
        agc: arguments of ``AdaptiveGradientClipping``, or None for no clipping.
        accumulate: batches of a step (``GradientAccumulation``). An iteration is a batch: max_iter
            and all other numbers of iterations count batches, and :class:`EachStep` is for the
            learning rate.
        kwargs: of ``kind``; those that are None are left to it, which takes away what a file has.

    Raises:
        InputError: a hook has no node; max_iter is no multiple of ``accumulate``; or another
            argument is not accepted.
    """
    nodes = hook_nodes or {}
    for name in hooks:
        if name not in nodes:
            raise InputError(f"optimizer.hooks: {name!r} has no node; {nearest(name, nodes)}")
    if accumulate > 1 and max_iter % accumulate:
        raise InputError(
            f"train.max_iter: {max_iter} is not accepted with optimizer.accumulate {accumulate}: "
            f"it counts batches; use a multiple of {accumulate}"
        )
    given = {key: value for key, value in kwargs.items() if value is not None}
    optimizer = (locate(kind) if isinstance(kind, str) else kind)(params, **given)
    # In the order in which they see a gradient.
    _see_every_step(optimizer)
    if accumulate != 1:
        GradientAccumulation(accumulate).attach(optimizer)
    if agc is not None:
        AdaptiveGradientClipping(model, **agc).attach(optimizer)
    with same_random_state([]):
        made = [instantiate(nodes[name]) for name in hooks]
    if made:
        StepHooks(made, model, max_iter).attach(optimizer)
    return optimizer


class StepHooks:
    """Runs hooks around the steps of an optimizer, where the trainer cannot take them.

    ``before_step`` is called before the model's forward pass in a training iteration, and
    ``after_step`` after the optimizer's step: in Detectron2's trainers before any of their own
    ``after_step``, that is before they save and evaluate. Iterations are those of Detectron2's
    event storage, in a resumed training, too. ``after_train`` is not called.

    Args:
        hooks: get this object as their ``trainer``.
        model: what the trainer runs, or wraps in a DistributedDataParallel.
        max_iter: the number of iterations.

    Attributes:
        hooks: as given.
        iter: the iteration in progress, counted from 0; -1 before the first one.
    """

    def __init__(self, hooks: Sequence[HookBase], model: nn.Module, max_iter: int) -> None:
        self.iter, self.max_iter, self.model = -1, max_iter, model
        self.hooks = list(hooks)
        self._autocast: dict[str, Any] = {"device_type": "cpu", "enabled": False}
        for hook in self.hooks:
            hook.trainer = self

    @property
    def storage(self) -> EventStorage:
        """Where the trainer's metrics go."""
        return get_event_storage()

    def attach(self, optimizer: Optimizer) -> None:
        """Have them called."""

        # A function, which a copy of the model shares: a method would be copied with the hooks.
        def before_forward(module: nn.Module, _: Any) -> None:
            self._before_forward(module)

        self.model.register_forward_pre_hook(before_forward)
        optimizer.register_step_post_hook(self._after_step)

    def _before_forward(self, module: nn.Module) -> None:
        if module is not self.model or not module.training or not has_event_storage():
            return
        iteration = get_event_storage().iter
        if iteration == self.iter:
            return  # another pass in it, that of PreciseBN for example
        is_first = self.iter < 0
        self.iter = iteration
        device = next(module.parameters()).device.type
        self._autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        for hook in self.hooks:
            if is_first:
                hook.before_train()
            hook.before_step()

    def _after_step(self, *_: Any) -> None:
        # What runs the model runs it as the iteration has.
        with torch.autocast(**self._autocast):
            for hook in self.hooks:
                hook.after_step()


class EachStep(ParamScheduler):
    """The schedule of a training whose optimizer takes several batches for a step.

    Iterations count batches there. All batches of a step have the multiplier of the step, so that
    steps have those of a training whose iterations are steps.

    Args:
        scheduler: of the multiplier over the training.
        accumulate: batches of a step.
        max_iter: batches of the training.
    """

    def __init__(self, scheduler: ParamScheduler, accumulate: int, max_iter: int) -> None:
        self.scheduler, self.accumulate, self.max_iter = scheduler, accumulate, max_iter

    def __call__(self, where: float) -> float:
        step = round(where * self.max_iter) // self.accumulate
        return self.scheduler(step * self.accumulate / self.max_iter)


def _see_every_step(optimizer: Any) -> None:
    """Have torch's GradScaler call ``step``, and its hooks, where a gradient has overflowed, too.

    It leaves out the call otherwise, and with it what is to happen in each iteration, such as
    PreciseBN before an evaluation. With this attribute it calls in any case, and leaves unscaling
    to the optimizer. Without a gradient, ``step`` leaves parameters as they are.

    Args:
        optimizer: of torch, which does not declare what GradScaler looks for and puts there.
    """
    optimizer._step_supports_amp_scaling = True
    optimizer.register_step_pre_hook(_unscale)


def _unscale(optimizer: Any, *_: Any) -> None:
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return
    has_overflown = bool(found_inf)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if has_overflown:
                parameter.grad = None
            elif parameter.grad is not None and optimizer.grad_scale is not None:
                parameter.grad.div_(optimizer.grad_scale)
    # Nothing is left to do for the optimizer itself; GradScaler removes the attributes.
    optimizer.grad_scale = optimizer.found_inf = None
