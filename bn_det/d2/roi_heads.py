"""RoI heads with a choice of batch: our norms, and RoIs mixed over all processes."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
)

from ..parts import part_norm, shuffle_of
from ..shuffle import shuffled
from .norms import NORMS


@ROI_BOX_HEAD_REGISTRY.register()
class BNFastRCNNConvFCHead(FastRCNNConvFCHead):
    """Detectron2's box head (same arguments, same keys) with our norms and shuffling.

    Its norm is that of ``MODEL.ROI_BOX_HEAD.NORM``. With ``MODEL.ROI_BOX_HEAD.SHUFFLE`` training
    runs it on RoIs of all processes in random order (:func:`bn_det.shuffle`).
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, shuffle: bool = False, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        if shuffle:
            shuffled(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": part_norm(cfg, "ROI_BOX_HEAD", NORMS) or "",
            "shuffle": shuffle_of(cfg, "ROI_BOX_HEAD"),
        }


@ROI_MASK_HEAD_REGISTRY.register()
class BNMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head (same arguments, same keys) with our norms and shuffling.

    Its norm is that of ``MODEL.ROI_MASK_HEAD.NORM``. With ``MODEL.ROI_MASK_HEAD.SHUFFLE`` training
    runs its layers on positive RoIs of all processes in random order; losses are each process's.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, shuffle: bool = False, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        if shuffle:
            shuffled(self, "layers")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": part_norm(cfg, "ROI_MASK_HEAD", NORMS) or "",
            "shuffle": shuffle_of(cfg, "ROI_MASK_HEAD"),
        }
