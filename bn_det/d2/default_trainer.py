"""Our hooks in any DefaultTrainer of Detectron2, and what is refused in one without them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch import nn

from ..config.keys import check_keys
from ..config.training import build_hooks, uses_precise_bn
from ..config.unread import HOOK_KEYS, TRAINER_KEYS, set_keys, warn_of_others
from ..errors import InputError
from ..layers import BATCH_NORMS, BatchNorm2d, DomainBatchNorm2d, name_layers
from ..layers.norms import NormFactory
from .hooks import HOOKS, build_precise_bn, build_virtual_batch


class BNHooks(TrainerBase):
    """The hooks that the keys of a config ask for; put it before DefaultTrainer in the bases.

    They come before those that evaluate and save, and our PreciseBN takes the place of
    Detectron2's. The layers over processes get their names, and their timeout.
    """

    reads_keys = HOOK_KEYS
    cfg: CfgNode

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if DefaultTrainer in bases and bases.index(DefaultTrainer) < bases.index(BNHooks):
            raise InputError(
                f"{cls.__name__}: BNHooks after DefaultTrainer is not accepted, as nothing would "
                "call it; put it first in the bases"
            )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        check_keys(cfg)
        warn_of_others(cfg)
        return super().build_model(cfg)

    def build_hooks(self) -> list[HookBase]:
        cfg = self.cfg
        check_keys(cfg)
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.cfg.TEST.PRECISE_BN.ENABLED = False
        try:
            ret = super().build_hooks()
        finally:
            self.cfg = cfg
        name_layers(self.model, cfg.SOLVER.SYNC_BN_TIMEOUT)
        ends = (k for k, h in enumerate(ret) if isinstance(h, (EvalHook, PeriodicCheckpointer)))
        first = next(ends, len(ret))
        precise = virtual = None
        if uses_precise_bn(cfg):
            precise = build_precise_bn(cfg, self.model, self.build_bn_loader)
        if cfg.SOLVER.VIRTUAL_IMAGES:
            virtual = build_virtual_batch(cfg, self.model, self.build_bn_loader)
        return [*ret[:first], *build_hooks(cfg, precise, virtual, HOOKS), *ret[first:]]

    @classmethod
    def build_bn_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """The batches of PreciseBN, and those of extra images: loaded as the training's are.

        They are of any images, whatever DATALOADER.CATEGORIES_PER_BATCH asks of the training's.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.CATEGORIES_PER_BATCH = 0
        return cls.build_train_loader(cfg)


def check_trainer(cfg: CfgNode, part: str, make: NormFactory | None) -> None:
    """Raise InputError where a trainer would run fvcore's PreciseBN on layers that it gets wrong.

    That is a DefaultTrainer, which builds Detectron2's hook itself. There is nothing of ours in it
    but the parts of its model, so it is found by who builds them: elsewhere, in evaluation or in
    another loop, TEST.PRECISE_BN.ENABLED does no harm.

    Args:
        part: of the model, one of PARTS.
        make: makes its norm.
    """
    _check_keys_of_trainer(cfg)
    norm = cfg.MODEL[part].NORM
    trainer = _builder() if cfg.TEST.PRECISE_BN.ENABLED and norm in BATCH_NORMS else None
    if make is None or trainer is None or isinstance(trainer, BNHooks):
        return
    layer, name = make(1), type(trainer).__name__
    assert isinstance(layer, BatchNorm2d)  # BATCH_NORMS name no other
    if not suits_fvcore(layer):
        raise InputError(
            f"TEST.PRECISE_BN.ENABLED: True is not accepted in {name}, a DefaultTrainer, with "
            f"MODEL.{part}.NORM {norm!r} ({type(layer).__name__}{layer.repr_of_choices()}): it "
            "runs fvcore's PreciseBN, which gets that wrong; put bn_det.d2.BNHooks before "
            f"DefaultTrainer in the bases of {name}, which runs ours, or use False"
        )


def _check_keys_of_trainer(cfg: CfgNode) -> None:
    """Raise InputError for keys that our trainer or our hooks read, in one that has neither."""
    asked = set_keys(cfg, (*HOOK_KEYS, *TRAINER_KEYS))
    trainer = _builder() if asked else None
    if trainer is None:
        return
    for key in asked:
        if key not in getattr(trainer, "reads_keys", ()):
            needs = "put bn_det.d2.BNHooks before DefaultTrainer in its bases"
            if key in TRAINER_KEYS:
                needs = "use bn_det.d2.train.Trainer (bn-det train)"
            raise InputError(
                f"{key}: {attrgetter(key)(cfg)!r} does nothing in {type(trainer).__name__}, a "
                f"DefaultTrainer: {needs}, or leave the key at its default; if it is a key of your "
                f"own that {type(trainer).__name__} reads, list it in its class, as reads_keys"
            )


def suits_fvcore(layer: BatchNorm2d) -> bool:
    """Whether fvcore's PreciseBN is right for a layer.

    It calls the model in training mode, with a momentum of 1, and takes what ``running_mean`` and
    ``running_var`` then are for the statistics of the one tensor that the layer has been called
    with.
    """
    return not (
        isinstance(layer, DomainBatchNorm2d)
        or layer.ghost_size is not None
        or layer.renorm is not None  # which goes by the population statistics
        or layer.train_statistics == "population"
        or not layer.update_population
    )


def _builder() -> DefaultTrainer | None:
    """The trainer in a method of which the caller is being run, if there is one."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DefaultTrainer):
            return owner
        frame = frame.f_back
    return None
