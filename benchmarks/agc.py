#!/usr/bin/env python
"""Adaptive gradient clipping of a ResNet-50's parameters: ours against timm's.

Gradients are such that one unit in ten is clipped. Where timm is not installed, its algorithm,
written here, is the baseline.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import resnet50

from bn_det.training.agc import AdaptiveGradientClipping
from timing import seconds

try:
    from timm.utils.agc import adaptive_clip_grad
except ImportError:

    def _norm(x: Tensor) -> Tensor:
        return x.norm() if x.ndim <= 1 else x.norm(dim=tuple(range(1, x.ndim)), keepdim=True)

    def adaptive_clip_grad(parameters: Sequence[Tensor], clip_factor: float, eps: float) -> None:
        for p in parameters:
            grad = p.grad.detach()
            limit, norm = _norm(p.detach()).clamp_(min=eps).mul_(clip_factor), _norm(grad)
            clipped = grad * (limit / norm.clamp(min=1e-6))
            p.grad.detach().copy_(torch.where(norm < limit, grad, clipped))


CLIP_FACTOR, EPS = 0.01, 1e-3


def set_gradients(model: nn.Module) -> None:
    """Of one unit in ten above the limit."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        units = grad.flatten(1) if p.dim() > 1 else grad.view(1, -1)
        weights = p.detach().reshape(units.shape)
        limit = weights.norm(dim=1, keepdim=True).clamp(min=EPS) * CLIP_FACTOR
        large = torch.rand(len(units), 1, generator=generator) < 0.1
        units *= limit / units.norm(dim=1, keepdim=True) * torch.where(large, 3.0, 0.3)
        p.grad = grad.to(p.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=30, help="of each, in turn")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = resnet50().to(args.device)
    parameters = list(model.parameters())
    ours = AdaptiveGradientClipping(model, CLIP_FACTOR, EPS, exclude=())

    def timm() -> None:
        adaptive_clip_grad(parameters, CLIP_FACTOR, EPS)

    times = {"timm": [], "ours": []}
    for _ in range(args.rounds + 3):
        for name, clip in (("timm", timm), ("ours", ours)):
            set_gradients(model)
            times[name].append(seconds(clip))
    ms = {name: 1000 * statistics.median(values[3:]) for name, values in times.items()}
    result = {
        "timm_ms": ms["timm"],
        "ours_ms": ms["ours"],
        "speedup": ms["timm"] / ms["ours"],
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(tabulate(list(result.items()), floatfmt=".3g"))


if __name__ == "__main__":
    main()
