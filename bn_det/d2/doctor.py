"""What the doctor examines on the Detectron2 host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..commands.any_model import AnyModel
from ..commands.launch import world_size
from ..commands.results import Score, score_of
from ..commands.target import as_training, target_score
from ..config.training import step_of, with_precise_bn_batches
from ..layers import record_sources
from .datasets import known_sources, load_test_images
from .recompute import train_batches
from .train import Trainer, check_data, load_model, setup

__all__ = ["known_sources", "load", "setup"]


def load(args: argparse.Namespace, cfg: CfgNode) -> AnyModel:
    """The checkpoint of a config, what it is trained with, and its AP."""
    step = step_of(cfg, world_size(args.num_gpus, args.num_machines))
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    model = load_model(cfg, resume=False, is_mended=True)
    cfg_of_passes = with_precise_bn_batches(cfg)
    target = ap_there = None
    if args.target is not None:
        target, ap_there = _target(cfg_of_passes, args.target)
    batches = train_batches(cfg_of_passes)
    of_data = batches, _call, score_of(cfg, Trainer.test), target, ap_there
    return AnyModel(model, *of_data, Trainer.build_optimizer(cfg, model), step)


def _target(cfg: CfgNode, name: str) -> tuple[Iterable[Any], Score | None]:
    """Batches of --target, and the AP there."""
    with as_training(cfg, name) as of_target:
        check_data(of_target, ("TRAIN",))
        return train_batches(of_target), target_score(of_target, _records, Trainer.test)


def _records(cfg: CfgNode) -> list[dict[str, Any]]:
    return load_test_images(cfg, filter_empty=False)


def _call(model: nn.Module, batch: list[dict[str, Any]]) -> Any:
    """Run any detector on images whose sources are named."""
    with record_sources(batch):
        return model(batch)
