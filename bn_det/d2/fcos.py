"""FCOS whose head has shared or per-level BatchNorm, from a config."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import Tensor, nn

from ..layers import forward_levels, normalize_tower
from .norms import make_part_norm
from .sources import NamesSources


class BNFCOSHead(FCOSHead):
    """Detectron2's head (same arguments, same keys), applied layer by layer to all levels.

    ``norm`` may be a callable that makes a :class:`~bn_det.DomainBatchNorm2d`. With its default
    choices the head computes what the stock head does with "BN", and their checkpoints are the
    same.

    Args:
        weight_norm: of the towers' weights, by name (:func:`bn_det.normalize_weight`).
        kwargs: as in the base class.
    """

    def __init__(self, *, weight_norm: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for tower in (self.cls_subnet, self.bbox_subnet):
            normalize_tower((m for m in tower if isinstance(m, nn.Conv2d)), weight_norm)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As in the base class: from a list of levels to logits, box deltas and centerness."""
        logits = forward_levels([self.cls_subnet, self.cls_score], features)
        hidden = forward_levels([self.bbox_subnet], features)
        deltas = forward_levels([self.bbox_pred], hidden)
        return logits, deltas, forward_levels([self.ctrness], hidden)


@META_ARCH_REGISTRY.register()
class BNFCOS(NamesSources, FCOS):
    """Detectron2's FCOS (same arguments) with :class:`BNFCOSHead`, from ``MODEL.BN_FCOS``.

    Detectron2 itself has FCOS in LazyConfig files only. Its pyramid's p6 and p7 are made of p5:
    ``MODEL.BACKBONE.NAME: "build_bn_fcos_resnet_fpn_backbone"``.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone, fcos = build_backbone(cfg), cfg.MODEL.BN_FCOS
        shapes = backbone.output_shape()
        shapes = [shapes[f] for f in fcos.IN_FEATURES]
        head = BNFCOSHead(
            input_shape=shapes,
            num_classes=fcos.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * fcos.NUM_CONVS,
            norm=make_part_norm(cfg, "BN_FCOS", len(shapes)),
            prior_prob=fcos.PRIOR_PROB,
            weight_norm=fcos.WEIGHT_NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }
