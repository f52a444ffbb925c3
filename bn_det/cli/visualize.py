"""Draw detections beside the truth: one picture of several images of a data set.

Of each image the truth is above and the detections, with their scores, below.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..config.ranges import check_value
from ..config.rules import between
from ..data.annotations import FARTHEST, are_numbers, is_box
from ..data.coco import CocoDataset, CocoSource, builtin_sources, check_names, load_coco
from ..data.images import check_size, read_image
from ..errors import InputError, check_positive
from ..files import check_other_file, read_json, write_aside

COLOURS = [(80, 80, 255), (80, 220, 80), (255, 140, 60), (60, 220, 255), (255, 80, 255)]
"""BGR, for the classes in turn."""

WIDEST = 20_000
"""Pixels of the picture's longer side."""

PICTURES = (".png", ".jpg", ".jpeg")

EDGE = 2
"""Pixels around an image."""


def draw_objects(image: np.ndarray, objects: list[dict], names: dict[int, str]) -> np.ndarray:
    """Boxes with labels on a copy of a BGR image.

    Args:
        objects: with ``bbox`` (x, y, width, height), ``category_id`` and, if detected, ``score``.
        names: of the categories, by id.
    """
    image = image.copy()
    classes = {category_id: k for k, category_id in enumerate(sorted(names))}
    for item in objects:
        x, y, width, height = item["bbox"]
        colour = COLOURS[classes[item["category_id"]] % len(COLOURS)]
        first, last = (round(x), round(y)), (round(x + width), round(y + height))
        cv2.rectangle(image, first, last, (255, 255, 255), 3)
        cv2.rectangle(image, first, last, colour, 2)
        label = names[item["category_id"]]
        if "score" in item:
            label += f" {item['score']:.2f}"
        _draw_label(image, label, first, colour)
    return image


def _draw_label(
    image: np.ndarray, label: str, corner: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Text on a plate of a colour, on top of a box's corner or, at the image's edge, inside it."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    (width, height), below = cv2.getTextSize(label, font, scale, 1)
    left = min(max(corner[0] - 1, 0), max(image.shape[1] - width, 0))
    bottom = max(corner[1], height + below + 1)
    cv2.rectangle(
        image, (left, bottom - height - below), (left + width, bottom), colour, cv2.FILLED
    )
    cv2.putText(image, label, (left, bottom - below), font, scale, (0, 0, 0), 1, cv2.LINE_AA)


def draw_image(dataset: CocoDataset, record: dict, detections: list[dict], size: int) -> np.ndarray:
    """The truth above the detections of one image, each scaled into a square."""
    image = cv2.cvtColor(read_image(record["file_name"]), cv2.COLOR_RGB2BGR)
    check_size(record["file_name"], image.shape[:2], record)
    scale = size / max(image.shape[:2])
    # No side of a long and narrow image becomes 0 pixels.
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    image = cv2.resize(image, (width, height))
    names = dict(zip(dataset.category_ids, dataset.category_names, strict=True))
    pictures = []
    for objects in (dataset.coco.imgToAnns[record["image_id"]], detections):
        scaled = [{**o, "bbox": [scale * v for v in o["bbox"]]} for o in objects]
        picture = np.zeros((size, size, 3), np.uint8)
        picture[: image.shape[0], : image.shape[1]] = draw_objects(image, scaled, names)
        pictures.append(cv2.copyMakeBorder(picture, EDGE, EDGE, EDGE, EDGE, cv2.BORDER_CONSTANT))
    return np.vstack(pictures)


def picture_of(
    dataset: CocoDataset,
    records: list[dict],
    detections: list[dict],
    threshold: float,
    size: int,
) -> np.ndarray:
    """Images side by side, truth above and the detections of a score that is large enough below."""
    by_image: dict[int, list[dict]] = {}
    for detection in detections:
        if detection["score"] >= threshold:
            by_image.setdefault(detection["image_id"], []).append(detection)
    columns = [draw_image(dataset, r, by_image.get(r["image_id"], []), size) for r in records]
    return np.hstack(columns)


def load_detections(path: str) -> list[dict]:
    """Detections in COCO's result format."""
    try:
        detections = read_json(path)
        if not isinstance(detections, list):
            raise ValueError(f"it is a {type(detections).__name__}; use a list")
        for number, detection in enumerate(detections):
            check_detection(number, detection)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"--input: {path} is not a file of detections: {e}") from e
    return detections


def check_detection(number: int, detection: Any) -> None:
    """Raise ValueError for what is none in COCO's result format."""
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(detection, dict) or not keys <= set(detection):
        raise ValueError(f"detection {number} lacks image_id, category_id, bbox or score")
    box, score = detection["bbox"], detection["score"]
    if not is_box(box) or min(box[2:]) < 0:
        raise ValueError(
            f"bbox of detection {number} is no x, y, width and height: {repr(box)[:60]}"
        )
    if not are_numbers([score]) or not 0 <= score <= 1:
        raise ValueError(
            f"score of detection {number} is no number from 0 to 1: {repr(score)[:60]}"
        )
    ids = detection["image_id"], detection["category_id"]
    if not all(type(of) in (int, str) for of in ids):
        raise ValueError(
            f"image_id or category_id of detection {number} is no id: {repr(ids)[:60]}"
        )


def check_detections(path: str, detections: list[dict], dataset: CocoDataset) -> None:
    """Raise InputError for one that is of another data set, or cannot be drawn."""
    sides = {image["image_id"]: max(image["height"], image["width"]) for image in dataset.records}
    for number, detection in enumerate(detections):
        image, category = detection["image_id"], detection["category_id"]
        start = f"--input: {path}: detection {number}"
        if image not in sides:
            raise InputError(f"{start}: image_id: {image!r} is no image of {dataset.name}")
        if category not in dataset.category_ids:
            raise InputError(f"{start}: category_id: {category!r} is no category of {dataset.name}")
        box = detection["bbox"]
        if max(map(abs, box)) > FARTHEST * sides[image]:
            raise InputError(
                f"{start}: bbox: {box} is not accepted; it is far outside of the image"
            )


def main(prog: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--input", required=True, help="coco_instances_results.json of a run")
    parser.add_argument("--output", required=True, help="the picture to write, PNG or JPEG")
    parser.add_argument("--dataset", default="shapes_val", help="name of the data set")
    parser.add_argument("--json", help="annotation file, for a data set of your own")
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--conf-threshold", type=float, default=0.4, help="least score to draw")
    parser.add_argument("--num-images", type=int, default=8, help="images, side by side")
    parser.add_argument("--first", type=int, default=0, help="the image to begin with")
    parser.add_argument("--size", type=int, default=256, help="pixels of an image's longer side")
    draw(parser.parse_args(arguments))


def draw(args: argparse.Namespace) -> None:
    check_positive("--num-images", args.num_images)
    check_value("--size", args.size, between(1, 4096))
    check_value("--conf-threshold", args.conf_threshold, between(0, 1))
    sources = builtin_sources()
    if args.images and not args.json:
        raise InputError("--images: is not accepted without --json, whose images it is about")
    if args.json:
        if not Path(args.json).is_file():
            raise InputError(f"--json: there is no file {args.json}")
        sources[args.dataset] = CocoSource(args.json, args.images or str(Path(args.json).parent))
    check_names("--dataset", [args.dataset], sources)
    source = sources[args.dataset]
    dataset = load_coco(args.dataset, source)
    if Path(args.output).suffix.lower() not in PICTURES:
        raise InputError(f"--output: {args.output!r} is not accepted; use {', '.join(PICTURES)}")
    read = [args.input, source.json_file, *(record["file_name"] for record in dataset.records)]
    check_other_file("--output", args.output, read, f"--input and the files of {args.dataset}")
    detections = load_detections(args.input)
    check_detections(args.input, detections, dataset)
    records = dataset.records[args.first : args.first + args.num_images]
    if not 0 <= args.first < len(dataset.records):
        raise InputError(f"--first: {args.first} is not one of the {len(dataset.records)} images")
    width = len(records) * (args.size + 2 * EDGE)
    if width > WIDEST:
        raise InputError(
            f"--num-images: {len(records)} is not accepted with --size {args.size}: a picture of "
            f"{width} pixels; use fewer or smaller images, for {WIDEST} at most"
        )
    picture = picture_of(dataset, records, detections, args.conf_threshold, args.size)
    _, encoded = cv2.imencode(Path(args.output).suffix, picture)
    with write_aside(args.output) as aside:
        Path(aside).write_bytes(encoded.tobytes())
    print(f"{args.output}: {len(records)} images, truth above, detections below")
