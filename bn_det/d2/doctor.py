"""What the doctor examines on the Detectron2 host."""

from __future__ import annotations

import argparse

from detectron2.utils.env import seed_all_rng

from ..commands.any_model import AnyModel
from ..commands.launch import world_size
from ..commands.results import score_of
from ..config.training import step_of, with_precise_bn_batches
from .recompute import train_batches
from .train import Trainer, load_model, setup


def load(args: argparse.Namespace) -> tuple[AnyModel, str]:
    """The checkpoint of a config, what it is trained with, and its AP; and its path."""
    cfg = setup(args)
    step = step_of(cfg, world_size(args.num_gpus, args.num_machines))
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    model = load_model(cfg, resume=False)
    batches = train_batches(with_precise_bn_batches(cfg))
    optimizer, score = Trainer.build_optimizer(cfg, model), score_of(cfg, Trainer.test)
    return AnyModel(model, batches, None, score, optimizer, step), cfg.MODEL.WEIGHTS
