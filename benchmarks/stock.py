"""Detectors as they are without us, in layers of torch."""

from __future__ import annotations

from torch import Tensor, nn

from bn_det import DomainBatchNorm2d


class InTurn(nn.ModuleList):
    """A layer for each level, each called in its turn."""

    position = 0

    def forward(self, x: Tensor) -> Tensor:
        layer = self[self.position]
        self.position = (self.position + 1) % len(self)
        return layer(x)


def with_stock_heads(model: nn.Module) -> nn.Module:
    """The model, in place, with layers for lists of levels as layers of torch that levels call.

    They compute the same where statistics are per level. Names and parameters stay.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DomainBatchNorm2d):
                parent.add_module(name, InTurn(_level(child, k) for k in range(child.num_domains)))
    return model


def _level(layer: DomainBatchNorm2d, domain: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(layer.num_features, layer.eps)
    bn.weight, bn.bias = layer.affine_of(domain).weight, layer.affine_of(domain).bias
    return bn.to(bn.weight)
