"""Adaptive gradient clipping, with which networks without normalization train at large rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

PREDICTORS = (
    "cls_score",
    "bbox_pred",
    "cls_logits",
    "bbox_reg",
    "objectness_logits",
    "anchor_deltas",
    "predictor",
)
"""Parts of the names of detectors' final layers, on both hosts."""


class AdaptiveGradientClipping:
    """Clips each unit's gradient to a part of the norm of the unit's weights.

    Brock et al., *High-Performance Large-Scale Image Recognition Without Normalization*, 2021,
    Sec. 4: with the Frobenius norms of a unit (an output channel's weights, or a whole vector such
    as a bias), G becomes G * clip_factor * max(|W|, eps) / |G| where |G| is larger than that. The
    units of a transposed convolution are on dimension 1 of its weight.

    Called before each step of the optimizer, on gradients that are final: of all processes,
    accumulated, and unscaled. :meth:`attach` sees to it, also with torch's GradScaler.

    Args:
        model: whose parameters are meant, as its modules hold them now.
        clip_factor: the paper's lambda.
        eps: so that weights that are zero can move.
        exclude: parameters that have one of these in their names are left alone; the final
            predictors by default, as in the paper.

    Raises:
        InputError: clip_factor or eps is not positive, or nothing of the model is left to clip.
    """

    def __init__(
        self,
        model: nn.Module,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        exclude: Sequence[str] = PREDICTORS,
    ) -> None:
        for name, value in (("clip_factor", clip_factor), ("eps", eps)):
            if not value > 0:
                raise InputError(f"{name}: {value!r} is not accepted; use more than 0")
        self.clip_factor, self.eps = clip_factor, eps
        transposed = {
            p
            for module in model.modules()
            if isinstance(module, nn.modules.conv._ConvTransposeNd)
            for p in module.parameters()  # of its normalized weight, too
        }
        self.parameters = [
            (p, 1 if p in transposed and p.dim() > 1 else 0)
            for name, p in model.named_parameters()
            if p.requires_grad and not any(part in name for part in exclude)
        ]
        if not self.parameters:
            raise InputError(f"exclude: {list(exclude)!r} leaves no parameter to clip")

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip the gradients, in place."""
        for parameter, dim in self.parameters:
            if parameter.grad is not None:
                self._clip(parameter.grad, parameter, dim)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have it called before each step of an optimizer."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        self()

    def _clip(self, grad: Tensor, parameter: Tensor, dim: int) -> None:
        limit = _unit_norm(parameter, dim).clamp_(min=self.eps).mul_(self.clip_factor)
        # A norm of 0 gives infinity, and so 1.
        factor = (limit / _unit_norm(grad, dim)).clamp_(max=1.0)
        # Where no unit is to be clipped a pass over the gradient can be saved; on a GPU to ask
        # would take longer.
        if grad.is_cuda or not bool((factor == 1).all()):
            grad.mul_(factor)


def _unit_norm(x: Tensor, dim: int) -> Tensor:
    """The norm of each unit, in float32 at least, to be broadcast over x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dim() <= 1:
        return torch.linalg.vector_norm(x, dtype=dtype)
    dims = [d for d in range(x.dim()) if d != dim]
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
