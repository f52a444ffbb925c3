"""The leakage measure on the torchvision host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from fvcore.common.config import CfgNode
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from ..files import check_writable
from ..layers import record_sources
from ..measure.bootstrap import Estimate
from ..measure.leakage import RoIBatch, check_architecture, measure_leakage
from .data import build_test_loader
from .train import load_model, setup
from .trainer import load_annotated


def measure(args: argparse.Namespace) -> tuple[CfgNode, dict[str, dict[str, Estimate]]]:
    """Measure the checkpoint of a config on DATASETS.TEST, as bn-det leakage says."""
    cfg = setup(args)
    check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_architecture(cfg)
    model: GeneralizedRCNN = load_model(cfg, resume=False).eval()
    model.roi_heads.mask_head = None  # which would have masks sampled, too
    loaders = [
        build_test_loader(cfg, dataset, args.images_per_batch) for dataset in load_annotated(cfg)
    ]
    head = model.roi_heads.box_head
    return cfg, measure_leakage(
        (batch for loader in loaders for batch in _sampled_rois(model, loader)),
        sum(map(len, loaders)),
        head,
        lambda x: model.roi_heads.box_predictor(head(x))[0],
    )


def _sampled_rois(model: GeneralizedRCNN, loader: Iterable[list]) -> Iterator[RoIBatch]:
    """RoIs as in training: its number of proposals, matched and sampled."""
    device = next(model.parameters()).device
    roi_heads = model.roi_heads
    model.rpn.training = True  # itself, not what is in it
    try:
        for batch in loader:
            images, truth, records = zip(*batch, strict=True)
            targets = [{k: v.to(device) for k, v in target.items()} for target in truth]
            with torch.no_grad(), record_sources(records):
                images, targets = model.transform([i.to(device) for i in images], targets)
                features = model.backbone(images.tensors)
                proposals, _ = model.rpn(images, features, targets)
                rois, samples = roi_heads.sample_rois(proposals, targets)
                levels = [features[f] for f in roi_heads.in_features]
                pooled = roi_heads.box_roi_pool(levels, rois)
            labels = torch.cat([s["classes"] for s in samples])
            yield RoIBatch(pooled, labels, background=roi_heads.num_classes)
    finally:
        model.rpn.training = False
