"""The shapes data set: coloured shapes on textured grounds, in COCO's format.

Small enough to train a detector on a laptop's CPU in minutes, and hard enough for AP to tell
detectors apart: objects from 12 to 112 pixels, tilted, partly occluded, on a noisy ground.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import InputError

VERSION = 1
"""Raised with every change of what is drawn, so that an older folder is not taken for this one."""

CATEGORIES = ("circle", "square", "triangle", "star")

IMAGE_SIZE = 128
"""Height and width of an image, in pixels."""

OBJECT_SIZES = (12.0, 112.0)
"""Range of the longer side of an object's box, in pixels. Sizes are log-uniform."""

MAX_TILT = np.pi / 9
"""Largest rotation of an object from upright, in radians."""

HUE_SPREAD = 0.1
"""Standard deviation of a category's hue, where the whole circle is one."""

MAX_OBJECTS = 5
"""Most objects in an image; the least is one."""

MAX_COVERED = 0.25
"""Largest part of an object's box that the box of another may cover."""


class Split(NamedTuple):
    """A part of the data set: its number of images, and the seed that sets it apart."""

    num_images: int
    seed: int


SPLITS = {"train": Split(1000, 0), "val": Split(200, 1)}


def generate_shapes(root: Path, splits: dict[str, Split] | None = None) -> Path:
    """Make sure that the data set is in a folder, and generate it where it is not.

    It is written aside and renamed, so that an interrupted generation leaves nothing that looks
    finished; of two processes that generate at once, the second finds the first one's work.

    Args:
        root: the folder, which gets ``annotations/instances_<split>.json`` and ``<split>/*.png``.
        splits: what to draw; SPLITS by default.

    Returns:
        root.

    Raises:
        InputError: the folder exists and holds something else.
    """
    if root.exists():
        _check_version(root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for name, split in (splits or SPLITS).items():
            _write_split(aside, name, split)
        aside.chmod(0o755)
        try:
            os.rename(aside, root)
        except OSError:
            # Another process was first. Its data set is the same: it depends on the seed alone.
            if not root.exists():
                raise
            _check_version(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def draw_image(seed: int, index: int) -> tuple[np.ndarray, list[dict]]:
    """One image and its objects. It depends on nothing but the seed and the index.

    Returns:
        a BGR image of shape (IMAGE_SIZE, IMAGE_SIZE, 3), uint8, and for each object a dict with
        ``category_id`` (from 1), ``bbox`` (x, y, width, height), ``segmentation`` (one polygon)
        and ``area``, in pixels.
    """
    rng = np.random.default_rng([VERSION, seed, index])
    image = _draw_ground(rng)
    sizes = np.exp(rng.uniform(*np.log(OBJECT_SIZES), size=rng.integers(1, MAX_OBJECTS + 1)))
    objects, boxes = [], []
    # From large to small, so that small ones are not hidden and large ones find a place.
    for size in sorted(sizes, reverse=True):
        category = int(rng.integers(len(CATEGORIES)))
        outline = _outline(CATEGORIES[category], rng)
        outline *= size / np.ptp(outline, axis=0).max()
        polygon = _place(outline, boxes, rng)
        if polygon is None:
            continue
        _fill(image, polygon, _draw_colour(category, rng), rng)
        boxes.append(_box_of(polygon))
        objects.append(_annotation(category + 1, polygon))
    noise = rng.normal(0, rng.uniform(2, 8), image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8), objects


def _write_split(root: Path, name: str, split: Split) -> None:
    (root / name).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(split.num_images):
        pixels, objects = draw_image(split.seed, index)
        file_name = f"{index:06d}.png"
        if not cv2.imwrite(str(root / name / file_name), pixels):
            raise OSError(f"{root / name / file_name}: could not be written")
        images.append(
            {"id": index + 1, "file_name": file_name, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        for annotation in objects:
            annotation.update(id=len(annotations) + 1, image_id=index + 1, iscrowd=0)
            annotations.append(annotation)
    content = {
        "info": {"description": "bn_det shapes", "version": VERSION, "seed": split.seed},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": c} for i, c in enumerate(CATEGORIES)],
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _check_version(root: Path) -> None:
    paths = sorted((root / "annotations").glob("instances_*.json"))
    if not paths:
        raise InputError(
            f"{root}: exists, and is not the shapes data set; move it away, and the data set is "
            "generated there"
        )
    for path in paths:
        try:
            version = json.loads(path.read_text())["info"]["version"]
        except (ValueError, KeyError, TypeError):
            version = None
        if version != VERSION:
            raise InputError(
                f"{root}: its {path.name} is not of version {VERSION} of the shapes data set "
                f"(found {version!r}); move the folder away, and it is generated anew"
            )


def _draw_ground(rng: np.random.Generator) -> np.ndarray:
    """A smooth greyish texture with a few lines, as float BGR."""
    # Of much the same colour in all images. With grounds of any colour each batch of 8 had
    # statistics of its own: after 800 steps AP was 3 with population statistics and 7 with batch
    # statistics, which is another experiment than telling detectors apart.
    colour = rng.normal(128, 12, 3)
    coarse = colour + rng.normal(0, 12, (6, 6, 3))
    image = cv2.resize(coarse, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(0, 4)):
        start, end = rng.integers(0, IMAGE_SIZE, (2, 2)).tolist()
        shade = (colour + rng.normal(0, 25, 3)).tolist()
        cv2.line(image, start, end, shade, int(rng.integers(1, 4)), cv2.LINE_8)
    return image


def _outline(category: str, rng: np.random.Generator) -> np.ndarray:
    """A tilted outline around the origin, shape (number of corners, 2)."""
    corners, inner = {"circle": (32, 1), "square": (4, 1), "triangle": (3, 1), "star": (5, 0.45)}[
        category
    ]
    radii = np.ones(corners) if inner == 1 else np.tile([1.0, inner], corners)
    upright = np.pi / 4 if category == "square" else -np.pi / 2
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    angles = upright + tilt + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _place(
    outline: np.ndarray, boxes: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray | None:
    """Move an outline to where it is inside and covers little, or None if no place is found."""
    low, high = outline.min(0), outline.max(0)
    for _ in range(20):
        polygon = outline + rng.uniform(-low, IMAGE_SIZE - 1 - high)
        box = _box_of(polygon)
        if all(_covered(box, other) <= MAX_COVERED for other in boxes):
            return polygon
    return None


def _box_of(polygon: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1."""
    return np.concatenate([polygon.min(0), polygon.max(0)])


def _covered(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two boxes have in common, relative to the smaller one."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    smaller = min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())
    return float(np.clip(sides, 0, None).prod() / smaller)


def _draw_colour(category: int, rng: np.random.Generator) -> np.ndarray:
    """A saturated BGR colour whose hue hints at the category, but does not settle it."""
    hue = category / len(CATEGORIES) + rng.normal(0, HUE_SPREAD)
    red_green_blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.4, 1))
    return 255 * np.array(red_green_blue[::-1])


def _fill(
    image: np.ndarray, polygon: np.ndarray, colour: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint a polygon with a shaded colour, in place."""
    mask = np.zeros(image.shape[:2], np.uint8)
    shift = 4  # fractional bits of OpenCV's fixed-point coordinates
    corners = np.round(polygon * 2**shift).astype(np.int32)
    cv2.fillPoly(mask, [corners], 1, cv2.LINE_8, shift)
    rows = np.linspace(-1, 1, image.shape[0])[:, None, None]
    shaded = np.clip(colour + rng.uniform(-30, 30) * rows, 0, 255)
    image[...] = np.where(mask[:, :, None] > 0, shaded, image)


def _annotation(category_id: int, polygon: np.ndarray) -> dict:
    # COCO's coordinates are of pixel corners, OpenCV's of pixel centres.
    polygon = polygon + 0.5
    x0, y0, x1, y1 = _box_of(polygon)
    x, y = polygon.T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    return {
        "category_id": category_id,
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "segmentation": [[round(float(v), 2) for v in polygon.ravel()]],
        "area": round(float(area), 2),
    }
