"""Blood cells from four laboratories: photographs in COCO's format, of one public data set.

TXL-PBC (Gan & Li, arXiv 2407.13214; github.com/lugan113/TXL-PBC_Dataset, MIT licence) has put four
data sets together and labelled them anew: white cells, red cells and platelets, in YOLO's format.
Each is of another laboratory, with its own stain, microscope and camera. The names of its files do
not tell which; the size of its images does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import InputError
from ..files import read_text

FOLDER = "blood_cells"
"""Beside Detectron2's own data sets."""

LABORATORIES = {
    (640, 480): "bccd",
    (416, 416): "bcd",
    (360, 363): "pbc",
    (366, 369): "pbc",
    (575, 575): "raabin",
}
"""By the width and height of the published images, in pixels: BCCD (Shenggan/BCCD_Dataset), BCD,
Peripheral Blood Cells (Acevedo et al. 2020, Barcelona), and Raabin-WBC (Kouzehkanan et al. 2022,
Tehran)."""

SPLITS = ("train", "val")

CATEGORIES = ("WBC", "RBC", "Platelet")
"""In the order of the published classes."""

LONGEST = 320
"""Of an image, in pixels."""

_QUALITY = 90
"""Of a JPEG, in percent."""


class Made(NamedTuple):
    """Of one laboratory and split: how many images and boxes."""

    name: str
    images: int
    boxes: int


def prepare_blood_cells(clone: Path, folder: Path) -> list[Made]:
    """Make the data sets of the four laboratories from a clone of TXL-PBC.

    Images are resized to 320 pixels at most, with area interpolation, and boxes clipped to them.
    The folder is there when all of it is.

    Args:
        clone: with ``TXL_PBC/images`` and ``TXL_PBC/labels``.
        folder: to be made, with ``annotations`` and ``images``.

    Raises:
        InputError: the folder exists; a file is missing, or is not as it was published.
    """
    if folder.exists():
        raise InputError(f"--output: {folder} exists; remove it, or name another folder")
    published = clone / "TXL_PBC"
    for part in (f"{kind}/{split}" for kind in ("images", "labels") for split in SPLITS):
        if not (published / part).is_dir():
            raise InputError(
                f"{clone}: has no folder TXL_PBC/{part}; use a clone of "
                "github.com/lugan113/TXL-PBC_Dataset"
            )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as e:
        raise InputError(f"--output: {folder}: cannot be written: {e.strerror}") from e
    try:
        made = [of for split in SPLITS for of in _make_split(published, split, aside)]
        aside.chmod(0o777 & ~_umask())
        aside.rename(folder)
    except OSError as e:
        raise InputError(f"--output: {folder}: cannot be written: {e.strerror}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return made


def _umask() -> int:
    """What new folders do not permit; a temporary one permits nothing to others."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _make_split(published: Path, split: str, folder: Path) -> list[Made]:
    contents = {name: _Content(f"{name}_{split}") for name in sorted(set(LABORATORIES.values()))}
    for path in sorted((published / "images" / split).iterdir()):
        image = cv2.imread(os.fspath(path), cv2.IMREAD_COLOR)
        if image is None:
            raise InputError(f"{path}: cannot be read as an image")
        height, width = image.shape[:2]
        name = LABORATORIES.get((width, height))
        if name is None:
            sizes = ", ".join(f"{width} x {height}" for width, height in LABORATORIES)
            raise InputError(
                f"{path}: is of {width} x {height} pixels, which is of no laboratory; use images "
                f"as they were published, of {sizes}"
            )
        scale = LONGEST / max(width, height)
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        labels = published / "labels" / split / f"{path.stem}.txt"
        contents[name].add(folder / "images" / name, small, _read_boxes(labels))
    (folder / "annotations").mkdir(exist_ok=True)
    for content in contents.values():
        text = json.dumps(content.as_coco())
        (folder / "annotations" / f"{content.name}.json").write_text(text)
    return [Made(c.name, len(c.images), len(c.annotations)) for c in contents.values()]


def _read_boxes(path: Path) -> list[tuple[int, np.ndarray]]:
    """Class and x0, y0, x1, y1 as shares of the image, of each line of a file of labels."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    boxes = []
    for number, line in enumerate(lines, 1):
        try:
            kind, *values = line.split()
            x, y, width, height = map(float, values)
            corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            corners = corners.clip(0, 1)
            is_finite = all(map(math.isfinite, (x, y, width, height)))
            is_box = is_finite and bool((corners[2:] > corners[:2]).all())
            if int(kind) not in range(len(CATEGORIES)) or not is_box:
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} is not accepted; use a class from 0 to "
                f"{len(CATEGORIES) - 1}, and x, y, width and height of a box in the image"
            ) from None
        boxes.append((int(kind), corners))
    return boxes


class _Content:
    """Images and boxes of one laboratory and split."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, folder: Path, image: np.ndarray, boxes: list[tuple[int, np.ndarray]]) -> None:
        """Save an image, and note its boxes."""
        number = len(self.images) + 1
        file_name = f"{self.name}_{number:04}.jpg"
        height, width = image.shape[:2]
        self.images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(
            cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
        )
        for kind, corners in boxes:
            x0, y0, x1, y1 = (corners * [width, height, width, height]).tolist()
            x, y, w, h = (round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0))
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": [x, y, w, h],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                }
            )

    def as_coco(self) -> dict:
        categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)]
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
