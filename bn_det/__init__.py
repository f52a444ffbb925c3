"""bn_det: the batch in BatchNorm as a choice, in object detectors."""

from .config import add_bn_det_config
from .layers import BatchNorm2d, DomainBatchNorm2d, convert_batchnorm, ghost_groups
from .moments import Moments
from .population import update_bn_stats
from .shuffle import shuffle, shuffled

__version__ = "0.1.0"

__all__ = [
    "BatchNorm2d",
    "DomainBatchNorm2d",
    "Moments",
    "add_bn_det_config",
    "convert_batchnorm",
    "ghost_groups",
    "shuffle",
    "shuffled",
    "update_bn_stats",
]
