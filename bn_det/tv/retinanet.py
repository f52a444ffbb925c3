"""RetinaNet's head for torchvision, on all feature levels at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)

from ..layers import forward_levels, normalize_tower
from ..layers.norms import NormFactory


class BNRetinaNetHead(RetinaNetHead):
    """torchvision's head, except that its layers see the list of levels.

    The towers are Detectron2's: ``num_convs`` times a 3x3 convolution with bias, the norm (if
    any) and ReLU. The losses are torchvision's, under Detectron2's names.

    Args:
        in_channels: channels of every level.
        num_anchors: anchors at each position.
        num_classes: number of classes, background not counted.
        num_convs: length of each tower.
        norm: from the number of channels to a layer for one level, or to a
            :class:`~bn_det.DomainBatchNorm2d` for all; None for no normalization.
        weight_norm: of the towers' weights, by name (:func:`bn_det.normalize_weight`).
        dropout: probability of dropout before the final layers.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        num_convs: int,
        norm: NormFactory | None,
        weight_norm: str = "",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, num_anchors, num_classes)

        def with_tower(head: _WithTower) -> _WithTower:
            head.conv = _tower(in_channels, num_convs, norm)
            normalize_tower((m for m in head.conv if isinstance(m, nn.Conv2d)), weight_norm)
            head.dropout = nn.Dropout(dropout)
            return head

        self.classification_head = with_tower(
            _ClassificationHead(in_channels, num_anchors, num_classes)
        )
        self.regression_head = with_tower(_RegressionHead(in_channels, num_anchors))

    def compute_loss(self, *args, **kwargs) -> dict[str, Tensor]:
        losses = super().compute_loss(*args, **kwargs)
        return {"loss_cls": losses["classification"], "loss_box_reg": losses["bbox_regression"]}


class _WithTower(nn.Module):
    """Has our tower, and loads keys as they are: torchvision would take them for its version 1."""

    conv: nn.Sequential
    dropout: nn.Dropout

    def _load_from_state_dict(self, *args) -> None:
        nn.Module._load_from_state_dict(self, *args)


class _ClassificationHead(_WithTower, RetinaNetClassificationHead):
    cls_logits: nn.Conv2d
    num_classes: int

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logits = forward_levels([self.conv, self.dropout, self.cls_logits], features)
        return _join_anchors(logits, self.num_classes)


class _RegressionHead(_WithTower, RetinaNetRegressionHead):
    bbox_reg: nn.Conv2d

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return _join_anchors(forward_levels([self.conv, self.dropout, self.bbox_reg], features), 4)


def _tower(channels: int, num_convs: int, norm: NormFactory | None) -> nn.Sequential:
    layers = []
    for _ in range(num_convs):
        conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        nn.init.normal_(conv.weight, std=0.01)
        assert conv.bias is not None  # by default
        nn.init.zeros_(conv.bias)
        layers += [conv, *([norm(channels)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def _join_anchors(predictions: Sequence[Tensor], size: int) -> Tensor:
    """From a (N, A * size, H, W) tensor for each level to (N, sum of H * W * A, size)."""
    return torch.cat(
        [p.unflatten(1, (-1, size)).permute(0, 3, 4, 1, 2).flatten(1, 3) for p in predictions], 1
    )
