"""Our data sets in Detectron2's catalogs."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..data.coco import CocoSource, prepare, readable, registered_sources, shapes_sources


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.REGISTER_COCO. A name can be registered again."""
    _register(registered_sources(cfg))


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
    prepare(name, source)
    with readable(name, source):
        return load_coco_json(source.json_file, source.image_root, name)


_register(shapes_sources())
