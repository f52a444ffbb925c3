"""The normalization layers of the torchvision host that have no choice of batch."""

from functools import partial

from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

NORMS = {
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
    "LN": partial(LayerNorm2d, eps=1e-6),
}
"""By Detectron2's names, each a callable from the number of channels."""
