"""Population statistics of a model: what normalizes at test time."""

from .average import average_population_statistics
from .report import LayerReport, PopulationReport
from .unchanged import evaluated_losses, unchanged_statistics
from .unfold import unfold
from .update import ShortLoaderError, update_bn_stats

__all__ = [
    "LayerReport",
    "PopulationReport",
    "ShortLoaderError",
    "average_population_statistics",
    "evaluated_losses",
    "unchanged_statistics",
    "unfold",
    "update_bn_stats",
]
