"""What the oldest torch that is claimed does not do; docs/where.md has the list."""

import pytest
import torch
from torch import nn


def not_on_torch_2_4(reason):
    """A mark of tests; torch 2.6 has stances, and 2.5 has not been tried."""
    return pytest.mark.skipif(
        not hasattr(torch.compiler, "set_stance"), reason=f"torch 2.4 {reason}"
    )


def without_bias(channels):
    """A BatchNorm as later torch makes it with bias=False, which 2.4 does not know."""
    layer = nn.BatchNorm2d(channels)
    layer.register_parameter("bias", None)
    return layer
