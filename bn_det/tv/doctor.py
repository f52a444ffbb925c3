"""What the doctor examines on the torchvision host."""

from __future__ import annotations

import argparse

import torch
from fvcore.common.config import CfgNode

from ..commands.any_model import AnyModel
from ..commands.results import score_of
from ..config.training import with_precise_bn_batches
from .recompute import train_batches
from .train import load_model, setup
from .trainer import check_datasets, load_datasets, losses_of, shared_seed, test


def load(args: argparse.Namespace) -> tuple[AnyModel, CfgNode]:
    """The checkpoint of a config with batches of DATASETS.TRAIN and its AP, and the config."""
    cfg = setup(args)
    check_datasets(cfg, "TRAIN")
    torch.manual_seed(shared_seed(cfg))
    model = load_model(cfg, resume=False)
    batches = train_batches(with_precise_bn_batches(cfg))
    score = score_of(cfg, lambda cfg, model: test(cfg, model, load_datasets(cfg, "TEST")))
    return AnyModel(model, batches, losses_of, score), cfg
