"""bn_det: the batch in BatchNorm as a choice, in object detectors.

Importing it imports nothing else: a name is looked for in its room once it is asked for. All of
them but add_bn_det_config need torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import add_bn_det_config
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

_ROOMS = ("layers", "population", "training", "doctor", "config")
"""That have these names, in the order in which they are looked in: the last needs yacs."""

if not TYPE_CHECKING:  # to type checkers, a name that is not there is an error

    def __getattr__(name: str) -> Any:
        """A room, or what is in one: a command shows its help before torch is imported."""
        if name in (*_ROOMS, "errors"):
            return import_module(f".{name}", __name__)
        if name in __all__:
            for room in _ROOMS:
                found = import_module(f".{room}", __name__)
                if name in found.__all__:
                    globals()[name] = getattr(found, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
