"""Meta-architectures that tell their layers the sources of images."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from ..layers import record_sources


class NamesSources(nn.Module):
    """A part of a meta-architecture that :class:`~bn_det.SourceBatchNorm2d` layers need.

    The source of an image is the integer under "source" in its dict, where ``register_datasets``
    puts it for the data sets of DATASETS.SOURCES, or a mapper of one's own for any other.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        with record_sources(batched_inputs):
            return super().forward(batched_inputs)


@META_ARCH_REGISTRY.register()
class BNGeneralizedRCNN(NamesSources, GeneralizedRCNN):
    """Detectron2's R-CNNs, whose backbone and FPN can have statistics for each source."""
