"""What the doctor examines on the torchvision host."""

from __future__ import annotations

import argparse

import torch

from ..commands.any_model import AnyModel
from ..commands.launch import world_size
from ..commands.results import score_of
from ..config.training import step_of, with_precise_bn_batches
from .recompute import train_batches
from .solver import build_optimizer
from .train import load_model, setup
from .trainer import check_datasets, load_datasets, losses_of, shared_seed, test


def load(args: argparse.Namespace) -> tuple[AnyModel, str]:
    """The checkpoint of a config, what it is trained with, and its AP; and its path."""
    cfg = setup(args)
    step = step_of(cfg, world_size(args.num_gpus, args.num_machines))
    check_datasets(cfg, "TRAIN")
    torch.manual_seed(shared_seed(cfg))
    model = load_model(cfg, resume=False)
    batches = train_batches(with_precise_bn_batches(cfg))
    score = score_of(cfg, lambda cfg, model: test(cfg, model, load_datasets(cfg, "TEST")))
    optimizer = build_optimizer(cfg, model)
    return AnyModel(model, batches, losses_of, score, optimizer, step), cfg.MODEL.WEIGHTS
