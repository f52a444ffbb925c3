"""bn_det: the batch in BatchNorm as a choice, in object detectors."""

from .config import add_bn_det_config
from .fuse import freeze, fuse
from .layers import (
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    bake_weight_norms,
    convert_batchnorm,
    forward_levels,
    ghost_groups,
    image_sources,
    no_population_update,
    normalize_weight,
    roi_levels,
    trained_with,
)
from .moments import Moments
from .population import update_bn_stats
from .shuffle import shuffle, shuffled
from .virtual import virtual_batch

__version__ = "0.1.0"

__all__ = [
    "BatchNorm2d",
    "DomainBatchNorm2d",
    "L1BatchNorm2d",
    "Moments",
    "RoILevelBatchNorm2d",
    "SourceBatchNorm2d",
    "add_bn_det_config",
    "bake_weight_norms",
    "convert_batchnorm",
    "forward_levels",
    "freeze",
    "fuse",
    "ghost_groups",
    "image_sources",
    "no_population_update",
    "normalize_weight",
    "roi_levels",
    "shuffle",
    "shuffled",
    "trained_with",
    "update_bn_stats",
    "virtual_batch",
]
