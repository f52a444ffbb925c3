"""Data sets: COCO's format, and the generated shapes."""

from .category_batches import CategoryBatches
from .coco import CocoDataset, CocoSource, builtin_sources, load_coco, registered_sources
from .shapes import generate_shapes

__all__ = [
    "CategoryBatches",
    "CocoDataset",
    "CocoSource",
    "builtin_sources",
    "generate_shapes",
    "load_coco",
    "registered_sources",
]
