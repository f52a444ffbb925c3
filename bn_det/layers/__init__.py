"""Normalization layers, and what puts them into models."""

from .batch_norm import BatchNorm2d
from .blocks import evaluated_with, ghost_groups, no_population_update, trained_with
from .convert import convert_batchnorm
from .domain_batch_norm import SHARING, DomainBatchNorm2d
from .freeze import freeze, thaw
from .frozen import FrozenBatchNorm
from .fuse import fuse
from .l1_batch_norm import L1BatchNorm2d
from .levels import PerLevel, forward_levels
from .moments import Moments
from .names import name_layers
from .norms import BASELINES, BATCH_NORMS, norm_factory
from .roi_levels import RoILevelBatchNorm2d, roi_levels
from .shuffle import shuffle, shuffled
from .sources import SourceBatchNorm2d, image_sources, record_sources
from .states import LayerState, States, states
from .tune import tune
from .unfuse import unfuse
from .weight_norms import (
    WEIGHT_NORMS,
    bake_weight_norms,
    normalize_convolutions,
    normalize_pyramid,
    normalize_tower,
    normalize_weight,
)

__all__ = [
    "BASELINES",
    "BATCH_NORMS",
    "SHARING",
    "WEIGHT_NORMS",
    "BatchNorm2d",
    "DomainBatchNorm2d",
    "FrozenBatchNorm",
    "L1BatchNorm2d",
    "LayerState",
    "Moments",
    "PerLevel",
    "RoILevelBatchNorm2d",
    "SourceBatchNorm2d",
    "States",
    "bake_weight_norms",
    "convert_batchnorm",
    "evaluated_with",
    "forward_levels",
    "freeze",
    "fuse",
    "ghost_groups",
    "image_sources",
    "name_layers",
    "no_population_update",
    "norm_factory",
    "normalize_convolutions",
    "normalize_pyramid",
    "normalize_tower",
    "normalize_weight",
    "record_sources",
    "roi_levels",
    "shuffle",
    "shuffled",
    "states",
    "thaw",
    "trained_with",
    "tune",
    "unfuse",
]
