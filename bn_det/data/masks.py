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
    if isinstance(segmentation, dict):
        return coco_mask.decode(compressed(segmentation))
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """An RLE, whose counts may be a list of numbers, with the counts as a string."""
    return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """RLE, ready for JSON, of a mask of shape (height, width)."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def run_lengths(counts: Any) -> list[int] | None:
    """The lengths of an RLE's runs of pixels outside and inside by turns; None if it has none.

    Args:
        counts: as COCO has them: numbers; or a string with 5 bits of a number in each character,
            from the lowest, in which every number from the third on is what it is more than the one
            before the last.
    """
    if isinstance(counts, list):
        runs = counts if all(type(n) is int for n in counts) else None
    else:
        runs = _decompressed(counts) if isinstance(counts, str) and counts.isascii() else None
    return None if runs is None or min(runs, default=-1) < 0 else runs


def _decompressed(counts: str) -> list[int] | None:
    runs: list[int] = []
    number = shift = 0
    for code in counts.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of a number
            if bits & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return None if shift else runs
