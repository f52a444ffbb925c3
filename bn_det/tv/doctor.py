"""What the doctor examines on the torchvision host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode

from ..commands.any_model import AnyModel
from ..commands.launch import world_size
from ..commands.results import score_of
from ..commands.target import as_training
from ..config.training import step_of, with_precise_bn_batches
from .recompute import train_batches
from .solver import build_optimizer
from .train import load_model, setup
from .trainer import (
    check_datasets,
    known_sources,
    load_datasets,
    losses_of,
    shared_seed,
    test,
)

__all__ = ["known_sources", "load", "setup"]


def load(args: argparse.Namespace, cfg: CfgNode) -> AnyModel:
    """The checkpoint of a config, what it is trained with, and its AP."""
    step = step_of(cfg, world_size(args.num_gpus, args.num_machines))
    check_datasets(cfg, "TRAIN")
    torch.manual_seed(shared_seed(cfg))
    model = load_model(cfg, resume=False, is_mended=True)
    cfg_of_passes = with_precise_bn_batches(cfg)
    target = None if args.target is None else _target_batches(cfg_of_passes, args.target)
    batches = train_batches(cfg_of_passes)
    score = score_of(cfg, lambda cfg, model: test(cfg, model, load_datasets(cfg, "TEST")))
    optimizer = build_optimizer(cfg, model)
    return AnyModel(model, batches, losses_of, score, target, optimizer, step)


def _target_batches(cfg: CfgNode, name: str) -> Iterable[list]:
    with as_training(cfg, name) as of_target:
        check_datasets(of_target, "TRAIN")
        return train_batches(of_target)
