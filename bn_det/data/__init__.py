"""Data sets: COCO's format, and the generated shapes."""

from .coco import CocoDataset, CocoSource, builtin_sources, load_coco, registered_sources
from .shapes import generate_shapes

__all__ = [
    "CocoDataset",
    "CocoSource",
    "builtin_sources",
    "generate_shapes",
    "load_coco",
    "registered_sources",
]
