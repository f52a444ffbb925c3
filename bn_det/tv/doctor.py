"""What the doctor examines on the torchvision host."""

from __future__ import annotations

import argparse

import torch

from ..commands.any_model import AnyModel
from ..config.training import with_precise_bn_batches
from .recompute import train_batches
from .train import load_model, setup
from .trainer import check_datasets, losses_of, shared_seed


def load(args: argparse.Namespace) -> AnyModel:
    """The checkpoint of a config, and batches of DATASETS.TRAIN."""
    cfg = setup(args)
    check_datasets(cfg, "TRAIN")
    torch.manual_seed(shared_seed(cfg))
    model = load_model(cfg, resume=False)
    return AnyModel(model, train_batches(with_precise_bn_batches(cfg)), losses_of)
