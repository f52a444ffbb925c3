"""Our hooks as Detectron2's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import AMPTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.engine.hooks import PreciseBN as D2PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config.training import Hooks, precise_bn_of, with_precise_bn_batches, with_virtual_batches
from ..errors import InputError
from ..population.passes import surround_passes
from ..population.snapshot import same_random_state
from ..training import hooks, monitor, spikes
from ..training.mixed_precision import autocast


def set_up_log(name: str) -> None:
    """Have a package's messages shown where nobody has seen to it: a project sets up its own."""
    if not logging.getLogger(name).hasHandlers():
        setup_logger(distributed_rank=comm.get_rank(), name=name)


class _BeforeSaving(hooks.Hook):
    """Mixed into a hook that changes the model before others evaluate and save it."""

    def before_train(self) -> None:
        registered = getattr(self.trainer, "_hooks", [])
        if self in registered:  # in a LazyConfig file's training it runs in the optimizer
            for other in registered[: registered.index(self)]:
                if isinstance(other, (EvalHook, PeriodicCheckpointer)):
                    name, its = type(self).__name__, type(other).__name__
                    raise InputError(
                        f"{name} is registered after {its}, which would get the model as it is "
                        f"before {name}; register it before"
                    )
        set_up_log("bn_det")
        super().before_train()


class AverageStatistics(_BeforeSaving, hooks.AverageStatistics, HookBase):
    """See :class:`bn_det.training.AverageStatistics`."""


def _context_of_training(self: HookBase) -> AbstractContextManager:
    # DefaultTrainer has the trainer with the loop's step inside.
    trainer = getattr(self.trainer, "_trainer", self.trainer)
    if isinstance(trainer, AMPTrainer):
        device = next(trainer.model.parameters()).device
        return autocast(device, trainer.precision)
    return nullcontext()


class PreciseBN(_BeforeSaving, hooks.PreciseBN, HookBase):
    """See :class:`bn_det.training.PreciseBN`.

    To be registered before the hooks that evaluate and save, in place of Detectron2's; from a
    config by :func:`build_precise_bn`.
    """

    context = _context_of_training

    def write(self, scalars: dict[str, float]) -> None:
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)


class VirtualBatch(hooks.VirtualBatch, HookBase):
    """See :class:`bn_det.training.VirtualBatch`. From a config by :func:`build_virtual_batch`."""

    context = _context_of_training


class FreezeBN(hooks.FreezeBN, HookBase):
    """See :class:`bn_det.training.FreezeBN`. To be registered before the hooks that save."""


class TuneBN(hooks.TuneBN, HookBase):
    """See :class:`bn_det.training.TuneBN`. To be registered after :class:`FreezeBN`."""


class RenormSchedule(hooks.RenormSchedule, HookBase):
    """See :class:`bn_det.training.RenormSchedule`."""


class LossSpikes(spikes.LossSpikes, HookBase):
    """See :class:`bn_det.training.LossSpikes`."""

    def loss(self) -> float | None:
        # Rank 0 has it, where metrics are gathered in this iteration.
        value, iteration = self.trainer.storage.latest().get("total_loss", (None, None))
        return value if iteration == self.trainer.iter else None


class Monitor(_BeforeSaving, monitor.Monitor, HookBase):
    """See :class:`bn_det.training.Monitor`."""

    def before_train(self) -> None:
        registered = getattr(self.trainer, "_hooks", [])
        # Detectron2's moves the EMA, and then puts what it has found in its place.
        self.expects_passes_between_steps = any(isinstance(h, D2PreciseBN) for h in registered)
        super().before_train()

    def write(self, scalars: dict[str, float]) -> None:
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)


HOOKS = Hooks(AverageStatistics, FreezeBN, RenormSchedule, TuneBN, LossSpikes, Monitor)


Load = Callable[[CfgNode], Iterable[Any]]
"""From a config to the batches of DATASETS.TRAIN."""


def build_precise_bn(
    cfg: CfgNode, model: nn.Module, load: Load = build_detection_train_loader
) -> PreciseBN:
    """The hook that TEST.PRECISE_BN asks for, with a data loader of its own.

    Building the loader and reading from it leave the training's random numbers as they are.
    """
    batches = with_precise_bn_batches(cfg)
    batches.DATALOADER.NUM_WORKERS = 0  # it rests nearly all the time
    with same_random_state([]):
        loader = load(batches)
    return PreciseBN(model=model, data_loader=loader, **precise_bn_of(cfg))


def build_virtual_batch(
    cfg: CfgNode, model: nn.Module, load: Load = build_detection_train_loader
) -> VirtualBatch:
    """The hook that SOLVER.VIRTUAL_IMAGES asks for, with a data loader of its own."""
    with same_random_state([]):
        loader = load(with_virtual_batches(cfg))
    return VirtualBatch(model, loader)


def _scratch_storage() -> EventStorage:
    """For what a model logs in passes that are no training; as late as the training is."""
    return EventStorage(get_event_storage().iter if has_event_storage() else 0)


surround_passes(_scratch_storage)
