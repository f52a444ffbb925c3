"""The losses by either statistics on the torchvision host."""

from __future__ import annotations

import argparse
from itertools import chain

from fvcore.common.config import CfgNode
from torch import nn

from ..data.category_batches import whole_batches
from ..files import check_writable
from ..measure.bootstrap import Estimate
from ..measure.loss import WeightedLoss, check_dense, measure_loss
from .data import build_test_loader
from .train import load_model, setup
from .trainer import load_annotated, losses_of


def measure(args: argparse.Namespace) -> tuple[CfgNode, dict[str, Estimate]]:
    """Measure the checkpoint of a config on DATASETS.TEST, as bn-det loss says."""
    cfg = setup(args)
    check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_dense(cfg)
    model = load_model(cfg, resume=False).eval()
    loaders, size = [], args.images_per_batch
    for dataset in load_annotated(cfg):
        order = whole_batches(dataset.records, size, cfg.DATALOADER.CATEGORIES_PER_BATCH)
        dataset = dataset._replace(records=[dataset.records[k] for k in order])
        loaders.append(build_test_loader(cfg, dataset, size))
    batches, number = chain(*loaders), sum(map(len, loaders))
    return cfg, measure_loss(batches, number, model, lambda batch: _loss(model, batch))


def _loss(model: nn.Module, batch: list) -> WeightedLoss:
    """Of a batch, the mean over its images."""
    model.training = True  # itself, not what is in it
    try:
        losses = losses_of(model, batch)
    finally:
        model.training = False
    return WeightedLoss(float(sum(losses.values())), len(batch))
