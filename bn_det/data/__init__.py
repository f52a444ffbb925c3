"""Data sets: COCO's format, the generated shapes, and blood cells of four laboratories."""

from .blood_cells import prepare_blood_cells
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
    "prepare_blood_cells",
    "registered_sources",
]
