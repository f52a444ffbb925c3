"""RPN whose head has shared or per-level BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from torch import Tensor, nn

from ..layers import forward_levels, normalize_tower
from .norms import make_part_norm


@RPN_HEAD_REGISTRY.register()
class BNRPNHead(StandardRPNHead):
    """Detectron2's head (same keys), with a norm after each 3x3 convolution, on all levels at once.

    The convolutions keep their bias, so that weights of the stock head load into it.

    Args:
        norm: as in Detectron2's heads a name or a callable, which may make a
            :class:`~bn_det.DomainBatchNorm2d`; :meth:`from_config` makes one of
            ``MODEL.RPN.NORM: "BN"`` and ``MODEL.RPN.BN``. Without one it is the stock head.
        weight_norm: of the convolutions' weights, by name (:func:`bn_det.normalize_weight`).
        kwargs: as in the base class.
    """

    @configurable
    def __init__(
        self,
        *,
        norm: str | Callable[[int], nn.Module] = "",
        weight_norm: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        convs = [m for m in self.conv.modules() if isinstance(m, Conv2d)]
        for conv in convs:
            conv.norm = get_norm(norm, conv.out_channels)
        normalize_tower(convs, weight_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        return {
            **ret,
            "norm": make_part_norm(cfg, "RPN", len(input_shape)),
            "weight_norm": cfg.MODEL.RPN.WEIGHT_NORM,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As in the base class: from a list of levels to their objectness and box deltas."""
        hidden = forward_levels([self.conv], features)
        logits = forward_levels([self.objectness_logits], hidden)
        return logits, forward_levels([self.anchor_deltas], hidden)
