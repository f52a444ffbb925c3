"""COCO evaluation of a torchvision detector by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert

from ..data.coco import CocoDataset
from ..data.masks import encode_mask
from ..files import write_text
from ..layers import record_sources
from ..layers.comm import share, world
from ..population.progress import with_progress
from .masks import paste_mask

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first six numbers of COCOeval, under Detectron2's names."""


def evaluate(
    model: nn.Module,
    loader: Iterable[list],
    dataset: CocoDataset,
    output_dir: str,
    tasks: Sequence[str] = ("bbox",),
) -> dict[str, dict[str, float]]:
    """Detect on a data set and compare with its annotations.

    The detections are written to ``coco_instances_results.json`` in COCO's format. Of several
    processes each detects on its share, and rank 0 compares.

    Args:
        model: a torchvision detector. It is left in the mode, training or not, that it was in.
        loader: batches of samples of the data set, this process's.
        output_dir: a folder, made if missing.
        tasks: what to measure: "bbox", or "segm" for masks.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ..., "AP-<category>": ...}}``, for each task, in percent;
        NaN where there is nothing to measure. Empty on other ranks than 0.
    """
    predictions = _gather(predict(model, loader, dataset))
    if world()[0] > 0:
        return {}
    path = Path(output_dir) / "coco_instances_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(predictions))
    logger.info("Saved %d detections to %s", len(predictions), path)
    return {task: coco_metrics(dataset, predictions, task) for task in tasks}


def predict(model: nn.Module, loader: Iterable[list], dataset: CocoDataset) -> list[dict]:
    """Detections on all images, in COCO's result format: boxes as x, y, width, height.

    If the model predicts masks, those are RLE under ``segmentation``, in the same records.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    predictions, start = [], time.monotonic()
    total = len(share(len(dataset.records)))
    try:
        for batch in with_progress(loader, total, logger, "Inference done %d/%d", len):
            images, _, records = zip(*batch, strict=True)
            with torch.inference_mode(), record_sources(records):
                outputs = model([image.to(device) for image in images])
            for image, record, output in zip(images, records, outputs, strict=True):
                predictions += _to_coco(output, image.shape[-2:], record, dataset.category_ids)
    finally:
        model.train(was_training)
    seconds = time.monotonic() - start
    logger.info("Inference on %d images took %.1f s", total, seconds)
    return predictions


def _gather(predictions: list[dict]) -> list[dict]:
    """On rank 0 those of all ranks, in their order; elsewhere none."""
    rank, num_ranks = world()
    if num_ranks == 1:
        return predictions
    parts: list[list[dict]] | None = [[] for _ in range(num_ranks)] if rank == 0 else None
    dist.gather_object(predictions, parts)
    return [p for part in parts or [] for p in part]


def coco_metrics(
    dataset: CocoDataset, predictions: list[dict], task: str = "bbox"
) -> dict[str, float]:
    """COCO's metrics of predicted boxes or masks, in percent, overall and per category.

    Args:
        task: "bbox" or "segm".
    """
    names = [*METRICS, *(f"AP-{name}" for name in dataset.category_names)]
    if not predictions:
        logger.warning("No detections: the metrics are not defined")
        return dict.fromkeys(names, float("nan"))
    # Where a record has a box, pycocotools would take its area for that of the mask, too.
    unused = "bbox" if task == "segm" else "segmentation"
    start = time.monotonic()
    predictions = [{k: v for k, v in p.items() if k != unused} for p in predictions]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = dataset.coco.loadRes(predictions)
        evaluation = COCOeval(dataset.coco, results, task)
        evaluation.evaluate()
        evaluation.accumulate()
        printed.truncate(printed.seek(0))
        evaluation.summarize()
    seconds, summary = time.monotonic() - start, printed.getvalue().rstrip()
    logger.info("COCO evaluation (%s) of %s took %.1f s:\n%s", task, dataset.name, seconds, summary)
    # precision: IoU threshold x recall x category x area range x detections per image
    per_category = [
        evaluation.eval["precision"][:, :, k, 0, -1] for k in range(len(dataset.category_ids))
    ]
    values = [*evaluation.stats[: len(METRICS)]]
    values += [p[p > -1].mean() if (p > -1).any() else -1 for p in per_category]
    return {
        name: float(value * 100) if value >= 0 else float("nan")
        for name, value in zip(names, np.asarray(values, dtype=float), strict=True)
    }


def _to_coco(
    output: dict[str, Tensor],
    size: tuple[int, int],
    record: dict,
    category_ids: list[int],
) -> list[dict]:
    original_size = (record["height"], record["width"])
    boxes = resize_boxes(output["boxes"], size, original_size).cpu()
    xywh = box_convert(boxes, "xyxy", "xywh")
    detections = [
        {
            "image_id": record["image_id"],
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(
            xywh.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True
        )
    ]
    if "masks" in output:
        for detection, mask, box in zip(detections, output["masks"].cpu(), boxes, strict=True):
            pasted = paste_mask(mask[0], box, original_size)
            detection["segmentation"] = encode_mask((pasted >= 0.5).numpy())
    return detections
