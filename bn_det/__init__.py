"""bn_det: the batch in BatchNorm as a choice, in object detectors.

Importing it needs torch and nothing else.
"""

from typing import TYPE_CHECKING, Any

from .doctor import examine
from .layers import (
    BatchNorm2d,
    DomainBatchNorm2d,
    FrozenBatchNorm,
    L1BatchNorm2d,
    Moments,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    bake_weight_norms,
    convert_batchnorm,
    evaluated_with,
    forward_levels,
    freeze,
    fuse,
    ghost_groups,
    image_sources,
    name_layers,
    no_population_update,
    normalize_weight,
    roi_levels,
    shuffle,
    shuffled,
    states,
    thaw,
    trained_with,
    tune,
    unfuse,
)
from .population import (
    average_population_statistics,
    evaluated_losses,
    unchanged_statistics,
    unfold,
    update_bn_stats,
)
from .training import virtual_batch

if TYPE_CHECKING:
    from .config import add_bn_det_config

__version__ = "0.1.0"

__all__ = [
    "BatchNorm2d",
    "DomainBatchNorm2d",
    "FrozenBatchNorm",
    "L1BatchNorm2d",
    "Moments",
    "RoILevelBatchNorm2d",
    "SourceBatchNorm2d",
    "add_bn_det_config",
    "average_population_statistics",
    "bake_weight_norms",
    "convert_batchnorm",
    "evaluated_losses",
    "evaluated_with",
    "examine",
    "forward_levels",
    "freeze",
    "fuse",
    "ghost_groups",
    "image_sources",
    "name_layers",
    "no_population_update",
    "normalize_weight",
    "roi_levels",
    "shuffle",
    "shuffled",
    "states",
    "thaw",
    "trained_with",
    "tune",
    "unchanged_statistics",
    "unfold",
    "unfuse",
    "update_bn_stats",
    "virtual_batch",
]


def __getattr__(name: str) -> Any:
    """What needs yacs, once it is asked for."""
    if name != "add_bn_det_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .config import add_bn_det_config

    return add_bn_det_config
