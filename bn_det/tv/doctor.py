"""What the doctor examines on the torchvision host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..commands.any_model import AnyModel
from ..commands.launch import world_size
from ..commands.results import Score, score_of
from ..commands.target import as_training, target_score
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
    target = ap_there = None
    if args.target is not None:
        target, ap_there = _target(cfg_of_passes, args.target)
    batches = train_batches(cfg_of_passes)
    of_data = batches, losses_of, score_of(cfg, _test), target, ap_there
    return AnyModel(model, *of_data, build_optimizer(cfg, model), step)


def _target(cfg: CfgNode, name: str) -> tuple[Iterable[list], Score | None]:
    """Batches of --target, and the AP there."""
    with as_training(cfg, name) as of_target:
        check_datasets(of_target, "TRAIN")
        return train_batches(of_target), target_score(of_target, _records, _test)


def _records(cfg: CfgNode) -> Iterator[dict[str, Any]]:
    for dataset in load_datasets(cfg, "TEST"):
        yield from dataset.records


def _test(cfg: CfgNode, model: nn.Module) -> dict:
    return test(cfg, model, load_datasets(cfg, "TEST"))
