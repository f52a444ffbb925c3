"""Masks of instances in COCO's formats: polygons and run-length encoding (RLE)."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Segmentation = list[list[float]] | dict[str, Any]
"""Polygons x1, y1, x2, y2, ... in pixels, whose union is meant; or RLE."""


def is_segmentation(value: Any) -> bool:
    """Whether a value can be decoded: RLE, or polygons of three points or more."""
    if isinstance(value, dict):
        return {"counts", "size"} <= set(value)
    return (
        isinstance(value, list)
        and len(value) > 0
        # pycocotools would take four numbers for a box.
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in value)
    )


def decode_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The pixels of an instance.

    Returns:
        uint8 of shape (height, width), 1 inside; of the RLE's own size if it is one.
    """
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return coco_mask.decode(segmentation)
    rle = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """RLE, ready for JSON, of a mask of shape (height, width)."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
