"""The leakage measure on the Detectron2 host."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from torch import nn

from ..files import check_writable
from ..layers import record_sources
from ..measure.bootstrap import Estimate
from ..measure.leakage import RoIBatch, check_architecture, measure_leakage
from .datasets import load_test_images
from .mapper import Mapper
from .train import load_model, setup


def measure(args: argparse.Namespace) -> tuple[CfgNode, dict[str, dict[str, Estimate]]]:
    """Measure the checkpoint of a config on DATASETS.TEST, as bn-det leakage says."""
    cfg = setup(args)
    check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_architecture(cfg)
    model: GeneralizedRCNN = load_model(cfg, resume=False).eval()
    loader = annotated_loader(cfg, load_test_images(cfg), args.images_per_batch)
    roi_heads = model.roi_heads
    head = nn.Sequential(roi_heads.box_head, roi_heads.box_predictor)
    return cfg, measure_leakage(
        _sampled_rois(model, loader), len(loader), roi_heads.box_head, lambda x: head(x)[0]
    )


def annotated_loader(
    cfg: CfgNode, dataset: list[dict], batch_size: int, order: Sequence[int] | None = None
) -> Any:
    """Images as for testing, with annotations as for training.

    Args:
        order: the indices of the images; by default each once.
    """
    mapper = Mapper(cfg, is_train=True, augmentations=build_augmentation(cfg, False))
    return build_detection_test_loader(
        dataset,
        mapper=mapper,
        sampler=order,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=batch_size,
    )


def _sampled_rois(model: GeneralizedRCNN, loader: Any) -> Iterator[RoIBatch]:
    """RoIs as in training: its number of proposals, matched and sampled."""
    roi_heads, proposal_generator = model.roi_heads, model.proposal_generator
    proposal_generator.training = True  # itself, not what is in it
    try:
        for inputs in loader:
            with torch.no_grad(), EventStorage(), record_sources(inputs):
                images = model.preprocess_image(inputs)
                truth = [x["instances"].to(model.device) for x in inputs]
                features = model.backbone(images.tensor)
                proposals, _ = proposal_generator(images, features, truth)
                proposals = roi_heads.label_and_sample_proposals(proposals, truth)
                pooled = roi_heads.box_pooler(
                    [features[f] for f in roi_heads.box_in_features],
                    [p.proposal_boxes for p in proposals],
                )
            labels = torch.cat([p.gt_classes for p in proposals])
            yield RoIBatch(pooled, labels, background=roi_heads.num_classes)
    finally:
        proposal_generator.training = False
