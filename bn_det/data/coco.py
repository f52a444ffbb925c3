"""Data sets in COCO's format by name, for both hosts."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pycocotools.coco import COCO
from yacs.config import CfgNode

from ..config.parts import DENSE, RCNNS
from ..errors import InputError, nearest
from .annotations import read_annotations
from .masks import is_segmentation
from .shapes import VARIANTS, Variant, generate_shapes


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
            counted from 0 and ``bbox`` as x, y, width, height in pixels; with
            ``segmentation`` where the masks were asked for.
    """

    name: str
    coco: COCO
    category_ids: list[int]
    category_names: list[str]
    records: list[dict]


def datasets_root() -> Path:
    """The folder that Detectron2's builtin data sets lie in, too."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def shapes_sources() -> dict[str, CocoSource]:
    """The data sets that we generate."""
    return {
        name: source
        for variant in VARIANTS.values()
        for name, source in _variant_sources(variant).items()
    }


def builtin_sources() -> dict[str, CocoSource]:
    """The data sets that need no registration: shapes, and COCO under Detectron2's names."""
    root = datasets_root() / "coco"
    coco = {
        f"coco_2017_{split}": CocoSource(
            str(root / "annotations" / f"instances_{split}2017.json"), str(root / f"{split}2017")
        )
        for split in ("train", "val")
    }
    return {**shapes_sources(), **coco}


def registered_sources(cfg: CfgNode) -> dict[str, CocoSource]:
    """The data sets of DATASETS.REGISTER_COCO.

    Raises:
        InputError: an entry is none, or has the name of another data set.
    """
    sources = {}
    for entry in cfg.DATASETS.REGISTER_COCO:
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

    Other architectures than those of our configs are not looked at.
    """
    parts = {**DENSE, **dict.fromkeys(RCNNS, "ROI_HEADS")}
    part = parts.get(cfg.MODEL.META_ARCHITECTURE)
    if part and found > cfg.MODEL[part].NUM_CLASSES:
        raise InputError(
            f"MODEL.{part}.NUM_CLASSES: {cfg.MODEL[part].NUM_CLASSES} is not accepted; {name} of "
            f"{key} has {found} categories"
        )


def prepare(name: str, source: CocoSource) -> None:
    """Generate a data set of ours where it is missing; check that the annotation file exists."""
    for variant in VARIANTS.values():
        if source == _variant_sources(variant).get(name):
            generate_shapes(datasets_root() / variant.name, variant=variant)
    if not Path(source.json_file).is_file():
        raise InputError(f"{name}: there is no annotation file {source.json_file}")


def _variant_sources(variant: Variant) -> dict[str, CocoSource]:
    root = datasets_root() / variant.name
    return {
        f"{variant.name}_{split}": CocoSource(
            str(root / "annotations" / f"instances_{split}.json"), str(root / split)
        )
        for split in variant.splits
    }


@contextlib.contextmanager
def readable(name: str, source: CocoSource) -> Iterator[None]:
    """Name the file in an error that a broken annotation file raises inside the block."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{name}: {source.json_file} is not valid JSON: {e}") from e
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AssertionError) as e:
        reason = " ".join(str(e).split())
        raise InputError(
            f"{name}: {source.json_file} is not in COCO's format for detection (images, "
            f"annotations and categories): {type(e).__name__} {reason}"
        ) from e


def load_coco(
    name: str, source: CocoSource, for_evaluation: bool = False, with_masks: bool = False
) -> CocoDataset:
    """Load a data set.

    Args:
        for_evaluation: whether pycocotools will compare detections with it, which takes the
            ``area`` and ``iscrowd`` of each annotation; training does without.
        with_masks: whether the instances' masks are needed, for training or evaluation.

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
            "height": image["height"],
            "width": image["width"],
            "annotations": [
                _record(annotation, classes, with_masks)
                for annotation in coco.imgToAnns[image["id"]]
            ],
        }
        for image in coco.loadImgs(sorted(coco.imgs))
    ]
    return CocoDataset(name, coco, category_ids, category_names, records)


def _record(annotation: dict, classes: dict[int, int], with_masks: bool) -> dict:
    record = {
        "bbox": [float(value) for value in annotation["bbox"]],
        "category_id": classes[annotation["category_id"]],
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if with_masks and is_segmentation(annotation.get("segmentation")):  # crowds may have none
        record["segmentation"] = annotation["segmentation"]
    return record
