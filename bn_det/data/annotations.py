"""COCO annotation files: read, and looked at before anything is made of them.

pycocotools takes what it is given: with a NaN in a polygon it ends the process, with run lengths
that do not fill the image it never ends, and boxes that nothing can match lower AP without a word.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import sub
from types import NoneType
from typing import Any

from ..errors import InputError, is_text, shown
from ..files import read_json
from .images import MAX_PIXELS
from .masks import is_segmentation, run_lengths

logger = logging.getLogger(__name__)

_SMALLEST = 1e-5
"""The shorter side of a box, in pixels, below which it is empty; the hosts leave such ones out."""

_LARGEST = 1e10
"""The area up to which pycocotools counts an object."""

_REACHES_OUT = 1
"""Pixels beyond the edge of an image that are more than rounding."""

_LAST_ID = 2**63 - 1
"""The highest id that NumPy has among integers: by higher ones it takes one image for another."""

FARTHEST = 10
"""How many times the longer side of its image a coordinate may be; masks take memory with it."""


def read_annotations(
    name: str, json_file: str, for_evaluation: bool = False, with_masks: bool = False
) -> dict[str, Any]:
    """The content of an annotation file in COCO's format for detection.

    Annotations of images that the file does not have are left out, and so are, for training, those
    with a box that is empty or outside of its image; warnings count them, and boxes that reach out
    of their images.

    Args:
        name: of the data set, which begins messages.
        for_evaluation: whether detections will be compared with it.
        with_masks: whether each object has to have a mask.

    Raises:
        InputError: it cannot be read, is in another format, or has something that cannot be meant:
            what is not unique or not finite, masks of another size, and the like.
    """
    where = f"{name}: {json_file}"
    content = _parsed(where, json_file)
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list):
            empty = ", empty for images without labels" if part == "annotations" else ""
            raise InputError(
                f"{where}: has no list of {part}{empty}, as COCO's format for detection has"
            )
        if part != "annotations" and not content[part]:
            raise InputError(f"{where}: has no {part}")
    images = _by_id(where, "image", content["images"], _check_image)
    categories = _by_id(where, "category", content["categories"], _check_category)
    _refuse_equal_names(where, categories)
    content["annotations"] = _Annotations(where, images, categories, for_evaluation, with_masks)(
        content["annotations"]
    )
    return content


def _parsed(where: str, json_file: str) -> dict[str, Any]:
    try:
        content = read_json(json_file)
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{where}: there is no such file") from e
    except OSError as e:
        raise InputError(f"{where}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise InputError(f"{where}: is a {type(content).__name__}, and not in COCO's format")
    return content


def _by_id(
    where: str, what: str, entries: Iterable[Any], check: Callable[[dict], str]
) -> dict[Hashable, dict]:
    """Entries by their ids; raises InputError for what is wrong with one of them."""
    found: dict[Hashable, dict] = {}
    for number, entry in enumerate(entries):
        entry_id = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(entry_id, (int, str)) or isinstance(entry_id, bool):
            raise InputError(f"{where}: {what} number {number} has no id (an integer)")
        if accepted := _why_not_held(entry_id):
            seen = _value(entry_id)
            raise InputError(
                f"{where}: {what} number {number}: id: {seen} is not accepted; use {accepted}"
            )
        if entry_id in found:
            raise InputError(f"{where}: two of {what} have the id {_value(entry_id)}")
        if why := check(entry):
            raise InputError(f"{where}: {what} {_value(entry_id)}: {why}")
        found[entry_id] = entry
    if len(kinds := {type(entry_id).__name__ for entry_id in found}) > 1:
        raise InputError(f"{where}: ids of {what} are of several types, {sorted(kinds)}; use int")
    return found


def _why_not_held(entry_id: int | str) -> str:
    """What to use instead of an id that an array of ids, as pycocotools makes, would not hold."""
    if isinstance(entry_id, str):
        return "text that does not end with a zero byte" * entry_id.endswith("\0")
    is_held = ~_LAST_ID <= entry_id <= _LAST_ID
    return "" if is_held else f"an integer of 64 bits, {~_LAST_ID} to {_LAST_ID}"


def _check_image(image: dict) -> str:
    if not isinstance(image.get("file_name"), str):
        return f"file_name: {_value(image.get('file_name'))} is not accepted; use a string"
    for key in ("height", "width"):
        size = image.get(key)
        if size is None or not (are_numbers([size]) and size > 0 and size == int(size)):
            return f"{key}: {_value(size)} is not accepted; use a number of pixels, 1 or more"
    if image["height"] * image["width"] > MAX_PIXELS:
        return f"height and width: more than {MAX_PIXELS} pixels are not accepted"
    return ""


def _check_category(category: dict) -> str:
    name = category.get("name")
    if not isinstance(name, str):
        return f"name: {_value(name)} is not accepted; use a string"
    return "" if is_text(name) else f"name: {_value(name)} is not accepted; use text of UTF-8"


def _refuse_equal_names(where: str, categories: dict[Hashable, dict]) -> None:
    ids: dict[str, Hashable] = {}
    for category_id, category in categories.items():
        name = category["name"]
        if name in ids:
            raise InputError(
                f"{where}: categories {_value(ids[name])} and {_value(category_id)} have the same "
                f"name, {_value(name)}; results are by name"
            )
        ids[name] = category_id


class _Annotations:
    """Looks at annotations one by one; called with all of them, it returns those to use."""

    def __init__(
        self,
        where: str,
        images: dict[Hashable, dict],
        categories: dict[Hashable, dict],
        for_evaluation: bool,
        with_masks: bool,
    ) -> None:
        self._where, self._images, self._categories = where, images, categories
        self._for_evaluation, self._with_masks = for_evaluation, with_masks

    def __call__(self, annotations: Sequence[Any]) -> list[dict]:
        short = [of for of in annotations if isinstance(of, dict) and _drop_short_polygons(of)]
        every = _by_id(self._where, "annotation", annotations, self._why_not)
        self._tell(short, "of whose polygons some have fewer than three points, which are left out")
        elsewhere, empty, outside, reaching, large = [], [], [], [], []
        for of in every.values():
            box, image = of["bbox"], self._images.get(of["image_id"])
            if image is None:
                elsewhere.append(of)
            elif min(box[2:]) < _SMALLEST:
                empty.append(of)
            elif min(_seen(box, image)) < _SMALLEST:
                outside.append(of)
            elif max(map(sub, box[2:], _seen(box, image))) > _REACHES_OUT:
                reaching.append(of)
            if self._for_evaluation and image and _is_larger(of["area"], image):
                large.append(of)
        self._tell(elsewhere, "of images that the file does not have are left out")
        self._tell(empty, "with an empty box are left out")
        self._tell(outside, "with a box outside of their image are left out")
        self._tell(reaching, "with a box that reaches out of its image, where detections end")
        what = "whose area, which sorts them into APs, APm and APl, is larger than their image"
        self._tell(large, what)
        left = {of["id"] for of in (*elsewhere, *empty, *outside)}
        return [of for of in annotations if of["id"] not in left]

    def _tell(self, some: list[dict], what: str) -> None:
        if some:
            first = _value(some[0]["id"])
            message = "%s: annotations %s: %d, the first of which is %s"
            logger.warning(message, self._where, what, len(some), first)

    def _why_not(self, annotation: dict) -> str:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if type(image_id) is not (kind := _kind(self._images)):
            seen = _value(image_id)
            return f"image_id: {seen} is not accepted; use the id of an image, {kind.__name__}"
        if type(category_id) is not (kind := _kind(self._categories)):
            seen = _value(category_id)
            return f"category_id: {seen} is not accepted; use the id of a category, {kind.__name__}"
        if category_id not in self._categories:
            return f"category_id: {_value(category_id)} is none of the file's categories"
        image = self._images.get(image_id)
        farthest = FARTHEST * max(image["height"], image["width"]) if image else math.inf
        return (
            _why_no_flags(annotation)
            or self._why_no_box(annotation.get("bbox"), image, farthest)
            or _why_no_mask(annotation.get("segmentation"), image, farthest)
            or _why_no_area(annotation.get("area"), self._for_evaluation)
            or (self._why_not_masked(annotation) if self._with_masks else "")
            or (_why_not_compared(annotation) if self._for_evaluation else "")
        )

    def _why_no_box(self, box: Any, image: dict | None, farthest: float) -> str:
        start = f"bbox: {_value(box)} is not accepted; "
        if not is_box(box):
            return f"{start}use x, y, width and height in pixels"
        if min(box[2:]) < 0:
            return f"{start}width and height are 0 or more"
        if max(map(abs, box)) > farthest:
            return f"{start}it is far outside of its image"
        if self._for_evaluation and min(box[2:]) < _SMALLEST:
            return f"{start}no detection can match an empty box, which would lower AP"
        if self._for_evaluation and image and min(_seen(box, image)) < _SMALLEST:
            return f"{start}no detection can match a box outside of its image, which would lower AP"
        return ""

    def _why_not_masked(self, annotation: dict) -> str:
        # Training leaves crowds out; the evaluation compares with them, too.
        is_used = self._for_evaluation or not annotation.get("iscrowd", 0)
        if is_used and not is_segmentation(annotation.get("segmentation")):
            return (
                "it has no segmentation (polygons of three points or more, or RLE), which "
                "MODEL.MASK_ON True takes"
            )
        return ""


def _drop_short_polygons(annotation: dict) -> bool:
    """Leave out what is no polygon, where others are left; whether there was any."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or is_segmentation(polygons):
        return False
    # What is no list is an error.
    left = [of for of in polygons if not isinstance(of, list) or is_segmentation([of])]
    if not left or len(left) == len(polygons):
        return False
    annotation["segmentation"] = left
    return True


def _kind(entries: dict[Hashable, dict]) -> type:
    """What the ids of entries are, which :func:`_by_id` has found to be the same for all."""
    return type(next(iter(entries)))


def _seen(box: Sequence[float], image: dict) -> tuple[float, float]:
    """Width and height of the part of a box that is in its image; negative where there is none."""
    x, y, width, height = box
    return (
        min(x + width, image["width"]) - max(x, 0),
        min(y + height, image["height"]) - max(y, 0),
    )


def _is_larger(area: float, image: dict) -> bool:
    """Whether an object would have more pixels than its image, by more than rounding."""
    height, width = (image[key] + 2 * _REACHES_OUT for key in ("height", "width"))
    return area > height * width


def _why_no_flags(annotation: dict) -> str:
    if (crowd := annotation.get("iscrowd", 0)) not in (0, 1):
        return f"iscrowd: {_value(crowd)} is not accepted; use 0 or 1"
    if (ignore := annotation.get("ignore", 0)) != 0:
        return (
            f"ignore: {_value(ignore)} is not accepted; the evaluations count it all the same: use "
            "iscrowd 1, or leave the annotation out"
        )
    return ""


def _why_not_compared(annotation: dict) -> str:
    number = annotation["id"]
    if not isinstance(number, int) or number < 1:
        return (
            f"id: {_value(number)} is not accepted; use an integer, 1 to {_LAST_ID}: by others the "
            "evaluations cannot tell what is matched"
        )
    return "" if "iscrowd" in annotation else "iscrowd: it has none; use 0 or 1"


def _why_no_area(area: Any, is_needed: bool) -> str:
    if area is None and not is_needed:
        return ""
    if not are_numbers([area]) or not 0 <= area <= _LARGEST:
        return f"area: {_value(area)} is not accepted; use a number of pixels, 0 to {_LARGEST:g}"
    return ""


def _why_no_mask(segmentation: Any, image: dict | None, farthest: float) -> str:
    """Why a segmentation, if there is one, cannot be decoded to what is meant."""
    if isinstance(segmentation, dict):
        return _why_no_runs(segmentation, image)
    if not isinstance(segmentation, (list, NoneType)):
        return f"segmentation: {_value(segmentation)} is not accepted; use polygons or RLE"
    for polygon in segmentation or ():
        if not isinstance(polygon, list) or not are_numbers(polygon):
            return "segmentation: a polygon is not accepted; use lists of finite numbers"
        if polygon and max(max(polygon), -min(polygon)) > farthest:
            return "segmentation: a polygon is far outside of its image"
    return ""


def _why_no_runs(rle: dict, image: dict | None) -> str:
    size: Any = rle.get("size")
    if image and size != [image["height"], image["width"]]:
        of_image = [image["height"], image["width"]]
        return (
            f"segmentation: an RLE of size {_value(size)} is not accepted; its image has {of_image}"
        )
    runs = run_lengths(rle.get("counts"))
    if runs is None:
        return "segmentation: the counts of an RLE are not accepted; use COCO's"
    if image and sum(runs) != size[0] * size[1]:
        return (
            f"segmentation: an RLE of {sum(runs)} pixels is not accepted; its size {size} has "
            f"{size[0] * size[1]}"
        )
    return ""


def is_box(value: Any) -> bool:
    """Whether a value is a list of four finite numbers, as COCO's boxes are."""
    return isinstance(value, list) and len(value) == 4 and are_numbers(value)


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers. Quick, as there are many."""
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        return math.isfinite(math.fsum(values))
    except (OverflowError, ValueError):
        return False


def _value(value: Any) -> str:
    """A value of the file for a message, which stays one line and short."""
    text = shown(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
