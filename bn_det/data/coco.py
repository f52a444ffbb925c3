"""Data sets in COCO's format by name, for both hosts."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pycocotools.coco import COCO
from yacs.config import CfgNode

from ..config.parts import DENSE, RCNNS
from ..errors import InputError, nearest
from . import blood_cells
from .annotations import read_annotations
from .masks import is_segmentation
from .shapes import VARIANTS, Variant, generate_shapes

logger = logging.getLogger(__name__)


class CocoSource(NamedTuple):
    """Where a data set lies: its annotation file, and the folder of its images."""

    json_file: str
    image_root: str


class CocoDataset(NamedTuple):
    """A loaded data set.

    Attributes:
        name: as in DATASETS.TRAIN or DATASETS.TEST.
        coco: the annotation file as pycocotools has it.
        category_ids, category_names: of the classes 0, 1, ... in the order of their COCO ids.
        records: for each image a dict in Detectron2's standard format, with ``category_id``
            counted from 0, ``bbox`` as x, y, width, height in pixels, and ``segmentation`` where
            there is one.
    """

    name: str
    coco: COCO
    category_ids: list[int]
    category_names: list[str]
    records: list[dict]


def datasets_root() -> Path:
    """The folder that Detectron2's builtin data sets lie in, too."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def own_sources() -> dict[str, CocoSource]:
    """The data sets that we generate, or make of a public one."""
    shapes = {
        name: source
        for variant in VARIANTS.values()
        for name, source in _variant_sources(variant).items()
    }
    return {**shapes, **_blood_cells_sources()}


def builtin_sources() -> dict[str, CocoSource]:
    """The data sets that need no registration: ours, and COCO under Detectron2's names."""
    root = datasets_root() / "coco"
    coco = {
        f"coco_2017_{split}": CocoSource(
            str(root / "annotations" / f"instances_{split}2017.json"), str(root / f"{split}2017")
        )
        for split in ("train", "val")
    }
    return {**own_sources(), **coco}


def registered_sources(cfg: CfgNode) -> dict[str, CocoSource]:
    """The data sets of DATASETS.REGISTER_COCO.

    Raises:
        InputError: an entry is none, or has the name of another data set.
    """
    sources: dict[str, CocoSource] = {}
    entries = cfg.DATASETS.REGISTER_COCO
    if not isinstance(entries, (list, tuple)):
        raise InputError(
            f"DATASETS.REGISTER_COCO: {entries!r} is not accepted; use a list of lists [name, JSON "
            "file, folder of images]"
        )
    for entry in entries:
        is_triple = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_triple or not all(isinstance(e, str) and e for e in entry):
            raise InputError(
                f"DATASETS.REGISTER_COCO: {entry!r} is not accepted; each entry is a list "
                "[name, JSON file, folder of images]"
            )
        source = CocoSource(*entry[1:])
        if sources.setdefault(entry[0], source) != source:
            raise InputError(
                f"DATASETS.REGISTER_COCO: {entry[0]!r} stands there twice, of other files"
            )
        check_free(entry[0], source, builtin_sources().get(entry[0], source))
    return sources


def check_free(name: str, source: CocoSource, other: CocoSource) -> None:
    """Raise InputError if a name of DATASETS.REGISTER_COCO is that of another data set."""
    if source != other:
        raise InputError(
            f"DATASETS.REGISTER_COCO: {name!r} is not accepted for {source.json_file}: it is the "
            f"name of the data set of {other.json_file}; use another name"
        )


def check_names(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError, with the nearest names, unless all names are known."""
    known = list(known)
    for name in names:
        if name not in known:
            own = "; DATASETS.REGISTER_COCO adds one of your files" * key.startswith("DATASETS.")
            raise InputError(
                f"{key}: {name!r} is not a registered data set; {nearest(name, known)}{own}"
            )


def check_num_classes(cfg: CfgNode, key: str, name: str, found: int) -> None:
    """Raise InputError if a data set has more categories than the detector has classes.

    A test set has to have as many: a detection of a further class would have no category. Other
    architectures than those of our configs are not looked at.
    """
    parts = {**DENSE, **dict.fromkeys(RCNNS, "ROI_HEADS")}
    part = parts.get(cfg.MODEL.META_ARCHITECTURE)
    if part is None:
        return
    number = cfg.MODEL[part].NUM_CLASSES
    if found > number or (found < number and key == "DATASETS.TEST"):
        raise InputError(
            f"MODEL.{part}.NUM_CLASSES: {number} is not accepted; {name} of {key} has {found} "
            "categories"
        )


def check_categories(key: str, categories: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError unless the data sets of a key have the same categories.

    Those of DATASETS.TEST, which are evaluated each by itself, may have other names
    (:func:`check_tested_categories`).

    Args:
        categories: the names of each data set's, in the order of the classes.
    """
    (first, expected), *others = [*categories.items()] or [("", [])]
    for name, found in others:
        if key == "DATASETS.TEST":
            _compare((name, found), (first, expected), key)
        elif found != expected:
            raise InputError(
                f"{key}: {list(categories)} have different categories: {name} has {found}, {first} "
                f"has {expected}"
            )


def check_tested_categories(
    trained: Mapping[str, Sequence[str]], tested: Mapping[str, Sequence[str]]
) -> None:
    """Raise InputError where a class would be trained as one category, and tested as another.

    A category under another name may be the same, of which a warning asks.

    Args:
        trained, tested: as :func:`check_categories` takes them, of DATASETS.TRAIN and TEST.
    """
    if trained and tested:
        _compare(next(iter(tested.items())), next(iter(trained.items())), "DATASETS.TRAIN")


def _compare(tested: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]], key: str) -> None:
    """Categories of a test set with those of another set, which a key names."""
    (test_set, after), (name, before) = tested, other
    for number, pair in enumerate(zip(before, after, strict=False)):
        if pair[0] == pair[1]:
            continue
        message = (
            f"DATASETS.TEST: class {number} is {pair[1]!r} in {test_set}, and {pair[0]!r} in "
            f"{name} of {key}"
        )
        if pair[0] in after or pair[1] in before:
            raise InputError(f"{message}; give the categories the same order by id")
        logger.warning("%s", message)


def without_objects(key: str, names: Sequence[str]) -> InputError:
    """What to raise for data sets that have no object."""
    return InputError(
        f"{key}: {names!r} is not accepted; name a data set that has an image with objects"
    )


def prepare(name: str, source: CocoSource) -> None:
    """Generate a data set of ours where it is missing; check that the annotation file exists."""
    for variant in VARIANTS.values():
        if source == _variant_sources(variant).get(name):
            generate_shapes(datasets_root() / variant.name, variant=variant)
    if not Path(source.json_file).is_file():
        made = source == _blood_cells_sources().get(name)
        hint = "; bn-det prepare-blood-cells makes it of a public data set" * made
        raise InputError(f"{name}: there is no annotation file {source.json_file}{hint}")


def _blood_cells_sources() -> dict[str, CocoSource]:
    root = datasets_root() / blood_cells.FOLDER
    return {
        f"{blood_cells.FOLDER}_{name}_{split}": CocoSource(
            str(root / "annotations" / f"{name}_{split}.json"), str(root / "images" / name)
        )
        for name in dict.fromkeys(blood_cells.LABORATORIES.values())
        for split in blood_cells.SPLITS
    }


def _variant_sources(variant: Variant) -> dict[str, CocoSource]:
    root = datasets_root() / variant.name
    return {
        f"{variant.name}_{split}": CocoSource(
            str(root / "annotations" / f"instances_{split}.json"), str(root / split)
        )
        for split in variant.splits
    }


def load_coco(
    name: str, source: CocoSource, for_evaluation: bool = False, with_masks: bool = False
) -> CocoDataset:
    """Load a data set.

    Args:
        for_evaluation: whether pycocotools will compare detections with it, which takes the
            ``area`` and ``iscrowd`` of each annotation; training does without.
        with_masks: whether each instance has to have a mask, for training or evaluation.

    Raises:
        InputError: the annotation file is missing, or :func:`read_annotations` refuses it.
    """
    prepare(name, source)
    coco = COCO()
    coco.dataset = read_annotations(name, source.json_file, for_evaluation, with_masks)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    category_ids = sorted(coco.cats)
    category_names = [c["name"] for c in coco.loadCats(category_ids)]
    classes = {category_id: k for k, category_id in enumerate(category_ids)}
    records = [
        {
            "file_name": os.path.join(source.image_root, image["file_name"]),
            "image_id": image["id"],
            "height": int(image["height"]),  # 128.0 is accepted, too
            "width": int(image["width"]),
            "annotations": [
                _record(annotation, classes) for annotation in coco.imgToAnns[image["id"]]
            ],
        }
        for image in coco.loadImgs(sorted(coco.imgs))
    ]
    return CocoDataset(name, coco, category_ids, category_names, records)


def _record(annotation: dict, classes: dict[int, int]) -> dict:
    record = {
        "bbox": [float(value) for value in annotation["bbox"]],
        "category_id": classes[annotation["category_id"]],
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if is_segmentation(annotation.get("segmentation")):
        record["segmentation"] = annotation["segmentation"]
    return record
