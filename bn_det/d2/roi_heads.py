"""RoI heads with a choice of batch: our norms, RoIs mixed over all processes, or level by level."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Instances
from torch import Tensor, nn

from ..config.parts import shuffle_of
from ..layers import normalize_tower, roi_levels
from ..layers.shuffle import shuffled
from .norms import make_part_norm


@ROI_BOX_HEAD_REGISTRY.register()
class BNFastRCNNConvFCHead(FastRCNNConvFCHead):
    """Detectron2's box head (same arguments, same keys) with our norms and shuffling.

    Its norm is that of ``MODEL.ROI_BOX_HEAD.NORM``. With ``MODEL.ROI_BOX_HEAD.SHUFFLE`` training
    runs it on RoIs of all processes in random order (:func:`bn_det.shuffle`). Where
    ``MODEL.ROI_BOX_HEAD.BN`` has a choice per level, it has to be in :class:`BNCascadeROIHeads`.
    ``weight_norm`` is a name for :func:`bn_det.normalize_weight`, ``dropout`` its probability on
    the head's output.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        shuffle: bool = False,
        weight_norm: str = "",
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        normalize_tower([*self.conv_norm_relus, *self.fcs], weight_norm)
        if dropout:
            self.add_module("dropout", nn.Dropout(dropout))
        if shuffle:
            shuffled(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        num_levels = len(cfg.MODEL.ROI_HEADS.IN_FEATURES)
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": make_part_norm(cfg, "ROI_BOX_HEAD", num_levels),
            "shuffle": shuffle_of(cfg, "ROI_BOX_HEAD"),
            "weight_norm": cfg.MODEL.ROI_BOX_HEAD.WEIGHT_NORM,
            "dropout": cfg.MODEL.ROI_BOX_HEAD.DROPOUT,
        }


@ROI_MASK_HEAD_REGISTRY.register()
class BNMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head (same arguments, same keys) with our norms and shuffling.

    Its norm is that of ``MODEL.ROI_MASK_HEAD.NORM``. With ``MODEL.ROI_MASK_HEAD.SHUFFLE`` training
    runs its layers on positive RoIs of all processes in random order; losses are each process's.
    ``weight_norm`` is as in the box head.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        shuffle: bool = False,
        weight_norm: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        normalize_tower([*self.conv_norm_relus, self.deconv], weight_norm)
        if shuffle:
            shuffled(self, "layers")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": make_part_norm(cfg, "ROI_MASK_HEAD"),
            "shuffle": shuffle_of(cfg, "ROI_MASK_HEAD"),
            "weight_norm": cfg.MODEL.ROI_MASK_HEAD.WEIGHT_NORM,
        }


@ROI_HEADS_REGISTRY.register()
class BNCascadeROIHeads(CascadeROIHeads):
    """Detectron2's Cascade R-CNN, whose box heads know the level that each RoI is pooled from.

    What RoIs of different levels share in the box heads' BatchNorm is ``MODEL.ROI_BOX_HEAD.BN``
    (:class:`~bn_det.RoILevelBatchNorm2d`). Each stage has its head, with statistics of its own.
    """

    def _run_stage(
        self, features: list[Tensor], proposals: list[Instances], stage: int
    ) -> tuple[Tensor, Tensor]:
        pooler = self.box_pooler
        levels = assign_boxes_to_levels(
            [p.proposal_boxes for p in proposals],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        with roi_levels(levels):
            return super()._run_stage(features, proposals, stage)
