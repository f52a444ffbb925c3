"""Our data sets in Detectron2's catalogs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import Sampler

from ..config.training import source_of
from ..data.annotations import read_annotations
from ..data.category_batches import CategoryBatches
from ..data.coco import (
    CocoSource,
    check_categories,
    check_free,
    check_names,
    check_num_classes,
    load_coco,
    own_sources,
    prepare,
    registered_sources,
)
from ..data.masks import compressed
from ..errors import InputError
from .engine import readable_datasets
from .mapper import Mapper

_OF_CONFIGS: set[str] = set()
"""The names that DATASETS.REGISTER_COCO has registered in this process."""


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.REGISTER_COCO, and name the sources of DATASETS.SOURCES.

    A name of DATASETS.REGISTER_COCO can be registered again. The images of any registered data set
    that DATASETS.SOURCES names have the number of its source in their dicts, under "source".

    Raises:
        InputError: a name is that of a data set which something else has registered, or unknown.
    """
    sources = registered_sources(cfg)
    for name, source in sources.items():
        if name in DatasetCatalog and name not in _OF_CONFIGS:
            other = MetadataCatalog.get(name)
            file = other.get("json_file", "a function in DatasetCatalog")
            check_free(name, source, CocoSource(file, other.get("image_root", "")))
    _OF_CONFIGS.update(sources)
    _register(sources)
    check_names("DATASETS.SOURCES", source_of(cfg), DatasetCatalog.list())
    for name, number in source_of(cfg).items():
        load = DatasetCatalog.pop(name)
        DatasetCatalog.register(name, partial(_load_with_source, load, number))


def known_sources(cfg: CfgNode) -> dict[str, CocoSource]:
    """Where the data sets lie that a config can name, as far as Detectron2's catalog says so."""
    known = {}
    for name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            known[name] = CocoSource(metadata.json_file, metadata.get("image_root", ""))
    return known


def check_files(cfg: CfgNode, split: str) -> dict[str, list[str]]:
    """Look at the annotation files of DATASETS.TRAIN or DATASETS.TEST, before anything is begun.

    Those of data sets that are registered as COCO's; others have no file that is known.

    Returns:
        the names of each one's categories, in the order of the classes.
    """
    categories, known = {}, known_sources(cfg)
    needs = {"for_evaluation": split == "TEST", "with_masks": cfg.MODEL.MASK_ON}
    for name in cfg.DATASETS[split]:
        source = known.get(name)
        if source and MetadataCatalog.get(name).get("evaluator_type") == "coco":
            prepare(name, source)
            content = read_annotations(name, source.json_file, **needs)
            by_id = sorted(content["categories"], key=itemgetter("id"))
            categories[name] = [category["name"] for category in by_id]
            check_num_classes(cfg, f"DATASETS.{split}", name, len(by_id))
            if split == "TRAIN" and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
                _refuse_rle(f"{name}: {source.json_file}", content["annotations"])
    check_categories(f"DATASETS.{split}", categories)
    return categories


def _refuse_rle(where: str, annotations: Iterable[dict[str, Any]]) -> None:
    """Raise InputError for one that training uses, which makes no polygons of it."""
    for annotation in annotations:
        is_used = not annotation.get("iscrowd", 0)
        if is_used and isinstance(annotation["segmentation"], dict):
            raise InputError(
                f"INPUT.MASK_FORMAT: 'polygon' is not accepted with {where}: annotation "
                f"{annotation['id']} is RLE; use 'bitmask'"
            )


def build_train_loader(cfg: CfgNode) -> Any:
    """Detectron2's, with batches of few categories where DATALOADER.CATEGORIES_PER_BATCH asks."""
    num_categories = cfg.DATALOADER.CATEGORIES_PER_BATCH
    if not num_categories:
        return build_bn_loader(cfg)
    dataset = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=True)
    size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = _CategorySampler(CategoryBatches(dataset, size, num_categories, seed))
    # Grouping would put images of one aspect ratio together instead.
    mapper = Mapper(cfg, is_train=True)
    return build_detection_train_loader(
        cfg, mapper=mapper, dataset=dataset, sampler=sampler, aspect_ratio_grouping=False
    )


def build_bn_loader(cfg: CfgNode) -> Any:
    """Batches as in training, of any images in any case."""
    return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))


def build_test_loader(cfg: CfgNode, name: str) -> Any:
    """This process's share of a data set, one image a batch."""
    return build_detection_test_loader(cfg, name, mapper=Mapper(cfg, is_train=False))


def load_training(cfg: CfgNode, load: Callable[[CfgNode], Any]) -> Any:
    """What a function makes of DATASETS.TRAIN, whose categories have to be the detector's."""
    with readable_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
        loader = load(cfg)
    for name in cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(name).get("thing_classes")
        if names is not None:
            check_num_classes(cfg, "DATASETS.TRAIN", name, len(names))
    return loader


def load_test_images(cfg: CfgNode, filter_empty: bool = True) -> list[dict]:
    """The images of DATASETS.TEST, by default without those that training leaves out, too."""
    with readable_datasets("DATASETS.TEST", cfg.DATASETS.TEST):
        return get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=filter_empty)


class _CategorySampler(Sampler):
    """The images of this process, without end."""

    def __init__(self, batches: CategoryBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[int]:
        return self.batches.orders([comm.get_rank()])


def _load_with_source(load: Callable[[], list[dict]], source: int) -> list[dict]:
    return [{**record, "source": source} for record in load()]


def _register(sources: dict[str, CocoSource]) -> None:
    for name, source in sources.items():
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load, name, source))
        MetadataCatalog.get(name).set(
            json_file=source.json_file, image_root=source.image_root, evaluator_type="coco"
        )


def _load(name: str, source: CocoSource) -> list[dict]:
    dataset = load_coco(name, source)
    MetadataCatalog.get(name).set(
        thing_classes=dataset.category_names,
        thing_dataset_id_to_contiguous_id={of: k for k, of in enumerate(dataset.category_ids)},
    )
    for record in dataset.records:
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
            if isinstance(annotation.get("segmentation"), dict):
                annotation["segmentation"] = compressed(annotation["segmentation"])
    return dataset.records


_register(own_sources())
