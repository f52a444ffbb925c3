"""What happens in a training beside its steps' forward and backward passes."""

from .accumulate import GradientAccumulation, accumulate
from .agc import AdaptiveGradientClipping
from .hooks import (
    AverageStatistics,
    FreezeBN,
    Hook,
    PreciseBN,
    RenormSchedule,
    TuneBN,
    VirtualBatch,
)
from .monitor import Monitor
from .spikes import LossSpikes
from .virtual_batch import virtual_batch

__all__ = [
    "AdaptiveGradientClipping",
    "AverageStatistics",
    "FreezeBN",
    "GradientAccumulation",
    "Hook",
    "LossSpikes",
    "Monitor",
    "PreciseBN",
    "RenormSchedule",
    "TuneBN",
    "VirtualBatch",
    "accumulate",
    "virtual_batch",
]
