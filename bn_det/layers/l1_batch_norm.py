"""Batch normalization by the mean absolute deviation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .batch import check_size, refuse_list
from .batch_norm import check_arguments
from .ema import count_batch, tracks
from .kernels import normalize_one
from .levels import PerLevel


class L1BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization whose scale is a mean absolute deviation (same arguments, same keys).

    Hoffer et al., *Norm matters: efficient and accurate normalization schemes in deep networks*,
    2018, Sec. 4: in training sqrt(pi / 2) times the mean of ``|x - mean|`` over the samples of this
    process takes the place of the standard deviation, to which it is equal for normal values. It
    needs no squares, which leave half precision.

    ``running_var`` is an EMA of the square of that, so that in evaluation the layer is an
    ``nn.BatchNorm2d``: whatever freezes, fuses or averages one is right for it, too. PreciseBN
    leaves it alone.

    Shape:
        (N, C, H, W) to the same. An empty input gives an empty output and updates nothing.

    Attributes:
        name: in its model, for messages (``name_layers``).

    Raises:
        InputError: in training there is a single value per channel.
    """

    name = ""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **kwargs: Any
    ) -> None:
        check_arguments(eps, momentum)
        super().__init__(num_features, eps, momentum, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        refuse_list(x)
        self._check_input_dim(x)
        mean, var = self.running_mean, self.running_var
        if x.numel() == 0 or (not self.training and mean is not None):
            return normalize_one(x, mean, var, self.weight, self.bias, self.eps)
        check_size(x.numel() // x.shape[1], f"{self.name}: " if self.name else "")
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = values.mean((0, 2, 3), keepdim=True)
        values = values - mean
        var = values.abs().mean((0, 2, 3), keepdim=True).square() * (math.pi / 2)
        self._update(mean.detach().flatten(), var.detach().flatten())
        y = values * (var + self.eps).rsqrt()
        if self.weight is not None:
            y = y * self.weight.view(-1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        return y.to(x.dtype)

    @classmethod
    def of_levels(cls, num_features: int, num_levels: int) -> PerLevel:
        """For a list of levels: each with its own statistics, one weight and bias for all."""
        layers = PerLevel(cls(num_features) for _ in range(num_levels))
        for layer in layers:
            layer.weight, layer.bias = layers[0].weight, layers[0].bias
        return layers

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        if not tracks(self):
            return
        momentum = count_batch(self)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)
