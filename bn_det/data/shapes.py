"""The shapes data sets: coloured shapes on textured grounds, in COCO's format.

Small enough to train a detector on a laptop's CPU in minutes, and hard enough for AP to tell
detectors apart: objects of many sizes, tilted, partly occluded, on a noisy ground.

In SHAPES each object has a category and a colour of its own. In SHAPES_CORRELATED the objects of
an image have them in common, as RoIs of one real image do: one category, one saturation and
brightness, one offset of the hue. There a single object is ambiguous: its own deviation of the hue
is as large as the distance between the categories, its outline is blunted towards a circle, and
the image is noisy. What its neighbours have in common tells more than the object itself, so a
BatchNorm that normalizes RoIs of one image together has something to leak.

SHAPES_FEW are so few images to train on, drawn as those of SHAPES, that a detector learns them by
heart.

SHIFTED are the very images of SHAPES in other appearances, for adaptation to another domain.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import InputError
from ..files import try_lock
from .appearance import APPEARANCES

CATEGORIES = ("circle", "square", "triangle", "star")

IMAGE_SIZE = 128
"""Height and width of an image, in pixels."""

MAX_TILT = np.pi / 9
"""Largest rotation of an object from upright, in radians."""

MAX_COVERED = 0.25
"""Largest part of an object's box that the box of another may cover."""


class Split(NamedTuple):
    """A part of a data set: its number of images, and the seed that sets it apart."""

    num_images: int
    seed: int


class Variant(NamedTuple):
    """What one of the data sets draws.

    Attributes:
        name: of the data set, to which ``_<split>`` is added, and of its folder.
        version: raised with every change of what is drawn, so that an older folder is not taken
            for this one.
        splits: no two splits have the same seed, but in other appearances.
        num_objects: least and most objects in an image; one that finds no place is left out.
        object_sizes: range of the longer side of an object's box, in pixels. Sizes are log-uniform.
        hue_spread: standard deviation of an object's hue, where the whole circle is one.
        noise: range of the standard deviation of an image's noise, in grey levels of 255.
        common_hue_spread: standard deviation of the hue that the objects of an image have in
            common, with their category, saturation and brightness; None if each has its own.
        bluntness: range of how far an outline is drawn towards a circle, from 0 to 1; None if it
            is not.
        appearance: one of APPEARANCES, which the finished image gets; "" for none.
    """

    name: str
    version: int
    splits: dict[str, Split]
    num_objects: tuple[int, int]
    object_sizes: tuple[float, float]
    hue_spread: float
    noise: tuple[float, float]
    common_hue_spread: float | None = None
    bluntness: tuple[float, float] | None = None
    appearance: str = ""


SHAPES = Variant(
    name="shapes",
    version=1,
    splits={"train": Split(1000, 0), "val": Split(200, 1)},
    num_objects=(1, 5),
    object_sizes=(12.0, 112.0),
    hue_spread=0.1,
    noise=(2.0, 8.0),
)

SHAPES_CORRELATED = Variant(
    name="shapes_correlated",
    version=1,
    splits={"train": Split(1000, 2), "val": Split(200, 3)},
    num_objects=(4, 7),
    object_sizes=(14.0, 48.0),
    hue_spread=0.2,
    noise=(8.0, 24.0),
    common_hue_spread=0.03,
    bluntness=(0.5, 1.0),
)

SHAPES_FEW = SHAPES._replace(name="shapes_few", splits={"train": Split(200, 4)})

SHIFTED = tuple(
    SHAPES._replace(name=f"shapes_{appearance}", appearance=appearance)
    for appearance in APPEARANCES
)

VARIANTS = {variant.name: variant for variant in (SHAPES, SHAPES_CORRELATED, SHAPES_FEW, *SHIFTED)}


class Theme(NamedTuple):
    """What the objects of one image have in common."""

    category: int
    hue: float
    saturation: float
    brightness: float


def generate_shapes(
    root: Path, splits: dict[str, Split] | None = None, variant: Variant = SHAPES
) -> Path:
    """Make sure that a data set is in a folder, and generate it where it is not.

    It is written aside and renamed, so that an interrupted generation leaves nothing that looks
    finished; of two processes that generate at once, the second finds the first one's work.

    Args:
        root: the folder, which gets ``annotations/instances_<split>.json`` and ``<split>/*.png``.
        splits: the parts to draw; those of the variant by default.
        variant: what to draw.

    Returns:
        root.

    Raises:
        InputError: the folder exists and holds something else.
    """
    if root.exists():
        _check_version(root, variant)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    with _locked_aside(root) as aside:
        for name, split in (splits or variant.splits).items():
            _write_split(aside, name, split, variant)
        # While it is held: without it, others take the folder for left behind.
        (aside / _LOCK).unlink()
        aside.chmod(0o755)
        try:
            os.rename(aside, root)
        except OSError:
            # Another process was first. Its data set is the same: it depends on the seed alone.
            if not root.exists():
                raise
            _check_version(root, variant)
    return root


_LOCK = ".lock"


@contextmanager
def _locked_aside(root: Path) -> Iterator[Path]:
    """A folder beside the one to be, with a file that is locked; what is left of it is removed."""
    while True:
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            with open(aside / _LOCK, "w") as lock:
                is_ours = True
                with suppress(OSError):  # where files cannot be locked
                    is_ours = try_lock(lock)
                # Another generation may have found the file before it was locked.
                if is_ours and (aside / _LOCK).exists():
                    yield aside
                    return
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _remove_unfinished(root: Path) -> None:
    """Remove what killed generations have left beside the folder."""
    for path in root.parent.glob(f".{root.name}-*/{_LOCK}"):
        with suppress(OSError), open(path, "r+") as lock:
            if try_lock(lock):
                shutil.rmtree(path.parent, ignore_errors=True)


def draw_image(seed: int, index: int, variant: Variant = SHAPES) -> tuple[np.ndarray, list[dict]]:
    """One image and its objects. It depends on nothing but the variant, the seed and the index.

    Returns:
        a BGR image of shape (IMAGE_SIZE, IMAGE_SIZE, 3), uint8, and for each object a dict with
        ``category_id`` (from 1), ``bbox`` (x, y, width, height), ``segmentation`` (one polygon)
        and ``area``, in pixels.
    """
    rng = np.random.default_rng([variant.version, seed, index])
    image = _draw_ground(rng)
    low, high = variant.num_objects
    smallest, largest = np.log(variant.object_sizes)
    sizes = np.exp(rng.uniform(smallest, largest, size=int(rng.integers(low, high + 1))))
    spread = variant.common_hue_spread
    theme = None if spread is None else _draw_theme(spread, rng)
    objects: list[dict] = []
    boxes: list[np.ndarray] = []
    # From large to small, so that small ones are not hidden and large ones find a place.
    for size in sorted(sizes, reverse=True):
        category = theme.category if theme else int(rng.integers(len(CATEGORIES)))
        outline = _outline(CATEGORIES[category], rng)
        if variant.bluntness is not None:
            outline = _blunt(outline, rng.uniform(*variant.bluntness))
        outline *= size / np.ptp(outline, axis=0).max()
        polygon = _place(outline, boxes, rng)
        if polygon is None:
            continue
        _fill(image, polygon, _draw_colour(category, variant, theme, rng), rng)
        boxes.append(_box_of(polygon))
        objects.append(_annotation(category + 1, polygon))
    image = np.clip(image + rng.normal(0, rng.uniform(*variant.noise), image.shape), 0, 255)
    if variant.appearance:
        image = np.clip(APPEARANCES[variant.appearance](image, rng), 0, 255)
    return image.round().astype(np.uint8), objects


def _write_split(root: Path, name: str, split: Split, variant: Variant) -> None:
    (root / name).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(split.num_images):
        pixels, objects = draw_image(split.seed, index, variant)
        file_name = f"{index:06d}.png"
        if not cv2.imwrite(str(root / name / file_name), pixels):
            raise InputError(f"{root / name / file_name}: could not be written: is the disk full?")
        images.append(
            {"id": index + 1, "file_name": file_name, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        for annotation in objects:
            annotation.update(id=len(annotations) + 1, image_id=index + 1, iscrowd=0)
            annotations.append(annotation)
    content = {
        "info": {**_identity(variant), "seed": split.seed},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": c} for i, c in enumerate(CATEGORIES)],
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _check_version(root: Path, variant: Variant) -> None:
    paths = sorted((root / "annotations").glob("instances_*.json"))
    if not paths:
        raise InputError(
            f"{root}: exists, and is not the {variant.name} data set; move it away, and the data "
            "set is generated there"
        )
    for path in paths:
        try:
            info = json.loads(path.read_text())["info"]
            found = {key: info[key] for key in _identity(variant)}
        except (ValueError, KeyError, TypeError):
            found = None
        if found != _identity(variant):
            raise InputError(
                f"{root}: its {path.name} is not of version {variant.version} of the "
                f"{variant.name} data set (found {found!r}); move the folder away, and it is "
                "generated anew"
            )


def _identity(variant: Variant) -> dict[str, str | int]:
    return {"description": f"bn_det {variant.name}", "version": variant.version}


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


def _blunt(outline: np.ndarray, amount: float) -> np.ndarray:
    """Draw an outline around the origin towards the unit circle: 0 leaves it, 1 is the circle."""
    steps = np.linspace(0, 1, 8, endpoint=False)[:, None]
    following = np.roll(outline, -1, axis=0)
    fine = np.concatenate([a + steps * (b - a) for a, b in zip(outline, following, strict=True)])
    radii = np.linalg.norm(fine, axis=1, keepdims=True)
    return fine * (1 - amount + amount / radii)


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


def _draw_theme(hue_spread: float, rng: np.random.Generator) -> Theme:
    return Theme(
        category=int(rng.integers(len(CATEGORIES))),
        hue=rng.normal(0, hue_spread),
        saturation=rng.uniform(0.5, 1),
        brightness=rng.uniform(0.4, 1),
    )


def _draw_colour(
    category: int, variant: Variant, theme: Theme | None, rng: np.random.Generator
) -> np.ndarray:
    """A saturated BGR colour whose hue hints at the category, but does not settle it."""
    hue = category / len(CATEGORIES) + rng.normal(0, variant.hue_spread)
    if theme is None:
        colour = (hue % 1, rng.uniform(0.5, 1), rng.uniform(0.4, 1))
    else:
        colour = ((hue + theme.hue) % 1, theme.saturation, theme.brightness)
    red_green_blue = colorsys.hsv_to_rgb(*colour)
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
