"""What the doctor examines on the Detectron2 host."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from ..commands.any_model import AnyModel
from ..commands.results import score_of
from ..config.training import with_precise_bn_batches
from .recompute import train_batches
from .train import Trainer, load_model, setup


def load(args: argparse.Namespace) -> tuple[AnyModel, CfgNode]:
    """The checkpoint of a config with batches of DATASETS.TRAIN and its AP, and the config."""
    cfg = setup(args)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    model = load_model(cfg, resume=False)
    batches = train_batches(with_precise_bn_batches(cfg))
    return AnyModel(model, batches, None, score_of(cfg, Trainer.test)), cfg
