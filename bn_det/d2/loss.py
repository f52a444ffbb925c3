"""The losses by either statistics on the Detectron2 host."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage

from ..data.category_batches import whole_batches
from ..files import check_writable
from ..measure.bootstrap import Estimate
from ..measure.loss import WeightedLoss, check_dense, measure_loss
from .datasets import load_test_images
from .leakage import annotated_loader
from .train import load_model, setup


def measure(args: argparse.Namespace) -> tuple[CfgNode, dict[str, Estimate]]:
    """Measure the checkpoint of a config on DATASETS.TEST, as bn-det loss says."""
    cfg = setup(args)
    check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_dense(cfg)
    model = load_model(cfg, resume=False).eval()
    dataset = load_test_images(cfg)
    size = args.images_per_batch
    order = whole_batches(dataset, size, cfg.DATALOADER.CATEGORIES_PER_BATCH)
    loader = annotated_loader(cfg, dataset, size, order)
    return cfg, measure_loss(loader, len(loader), model, lambda batch: _loss(model, batch))


def _loss(model: DenseDetector, batch: Any) -> WeightedLoss:
    """Of a batch for each of its positives: the running mean of a training is of its batches."""
    positives = []

    def own_positives(name: str, value: float, initial_value: float) -> float:
        positives.append(value)
        return value

    model.training = True  # itself, not what is in it
    model._ema_update = own_positives
    try:
        with EventStorage():
            losses = model(batch)
    finally:
        model.training = False
        del model._ema_update
    return WeightedLoss(float(sum(losses.values())), float(positives[0]))
