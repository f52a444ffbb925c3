"""RetinaNet whose head has shared or per-level BatchNorm."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..layers import forward_levels, normalize_tower
from .norms import make_part_norm
from .sources import NamesSources


class BNRetinaNetHead(RetinaNetHead):
    """Detectron2's head (same arguments, same keys), applied layer by layer to all levels.

    ``norm`` may be a callable that makes a :class:`~bn_det.DomainBatchNorm2d`, which then sees
    all levels at once; :meth:`from_config` makes one of ``MODEL.RETINANET.NORM: "BN"`` and
    ``MODEL.RETINANET.BN``. With the default choices (per-level statistics, shared affine) the head
    computes what the stock head does with "BN", and their checkpoints are the same.

    Args:
        weight_norm: of the towers' weights, by name (:func:`bn_det.normalize_weight`).
        dropout: probability of dropout before the final layers.
        kwargs: as in the base class.
    """

    @configurable
    def __init__(self, *, weight_norm: str = "", dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropout = nn.Dropout(dropout)
        for tower in (self.cls_subnet, self.bbox_subnet):
            normalize_tower((m for m in tower if isinstance(m, nn.Conv2d)), weight_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        return {
            **ret,
            "norm": make_part_norm(cfg, "RETINANET", len(input_shape)),
            "weight_norm": cfg.MODEL.RETINANET.WEIGHT_NORM,
            "dropout": cfg.MODEL.RETINANET.DROPOUT,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As in the base class: from a list of levels to their logits and box deltas."""
        logits = forward_levels([self.cls_subnet, self.dropout, self.cls_score], features)
        deltas = forward_levels([self.bbox_subnet, self.dropout, self.bbox_pred], features)
        return logits, deltas


@META_ARCH_REGISTRY.register()
class BNRetinaNet(NamesSources, RetinaNet):
    """Detectron2's RetinaNet with :class:`BNRetinaNetHead`."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # The base class builds the stock head, which is replaced below, from the norm's name: it
        # has to be one that the base class knows.
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.RETINANET.NORM = ""
        ret = super().from_config(stock)
        shapes = ret["backbone"].output_shape()
        ret["head"] = BNRetinaNetHead(cfg, [shapes[f] for f in ret["head_in_features"]])
        return ret
