"""ResNet-FPN backbones with our BatchNorm."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..layers import BASELINES, BATCH_NORMS, convert_batchnorm
from ..parts import part_norm
from .norms import NORMS


@BACKBONE_REGISTRY.register()
def build_bn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As ``build_resnet_fpn_backbone``, with our layers for BATCH_NORMS."""
    return _build_fpn(cfg, _build_resnet(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_bn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As ``build_retinanet_resnet_fpn_backbone``, with our layers for BATCH_NORMS."""
    bottom_up = _build_resnet(cfg, input_shape)
    res5_channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(res5_channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet, which takes the norm by name, with its BatchNorm exchanged.

    What FREEZE_AT freezes is FrozenBN by then, and stays so.
    """
    make = part_norm(cfg, "RESNETS", NORMS)
    if cfg.MODEL.RESNETS.NORM not in (*BATCH_NORMS, *BASELINES):
        return build_resnet_backbone(cfg, input_shape)
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.RESNETS.NORM = "BN"
    return convert_batchnorm(build_resnet_backbone(stock, input_shape), make)


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        # FPN decides by comparison with "" whether its convolutions have a bias.
        norm=part_norm(cfg, "FPN", NORMS) or "",
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
