"""ResNet-FPN backbones with our BatchNorm, or with a normalizer-free net for the ResNet."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..config.nf import STRIDES, NFBackbone, build_nf, make_nf
from ..config.parts import convert_resnet
from ..errors import InputError
from ..layers import (
    BASELINES,
    BATCH_NORMS,
    normalize_convolutions,
    normalize_pyramid,
)
from .norms import make_part_norm


@BACKBONE_REGISTRY.register()
def build_bn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As ``build_resnet_fpn_backbone``, with our layers for BATCH_NORMS."""
    return _build_fpn(cfg, _build_resnet(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_bn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As ``build_retinanet_resnet_fpn_backbone``, with our layers for BATCH_NORMS."""
    bottom_up = _build_resnet(cfg, input_shape)
    return _build_fpn(cfg, bottom_up, _p6_p7(cfg, bottom_up))


@BACKBONE_REGISTRY.register()
def build_nf_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The normalizer-free net of MODEL.NF, and a pyramid of p2 to p6 for R-CNNs."""
    return _build_fpn(cfg, build_nf(cfg, _NFBackbone), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_nf_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The normalizer-free net of MODEL.NF, and a pyramid of p3 to p7 for RetinaNet."""
    bottom_up = build_nf(cfg, _NFBackbone)
    return _build_fpn(cfg, bottom_up, _p6_p7(cfg, bottom_up))


class _NFBackbone(NFBackbone, Backbone):
    def output_shape(self) -> dict[str, ShapeSpec]:
        return {n: ShapeSpec(channels=c, stride=STRIDES[n]) for n, c in self.channels.items()}


def _p6_p7(cfg: CfgNode, bottom_up: Backbone) -> LastLevelP6P7:
    channels = bottom_up.output_shape()["res5"].channels
    return LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS)


@BACKBONE_REGISTRY.register()
def build_bn_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As :func:`build_bn_retinanet_resnet_fpn_backbone`, but p6 and p7 are made of p5.

    Tian et al., *FCOS: A Simple and Strong Anchor-free Object Detector*, 2020, Sec. 2.2.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return _build_fpn(cfg, _build_resnet(cfg, input_shape), top_block)


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet, which takes the norm by name, with its BatchNorm exchanged.

    What FREEZE_AT freezes is FrozenBN by then, and stays so.
    """
    node, make = cfg.MODEL.RESNETS, make_part_norm(cfg, "RESNETS")
    if node.WEIGHT_NORM and any(node.DEFORM_ON_PER_STAGE):
        raise InputError(
            f"MODEL.RESNETS.WEIGHT_NORM: {node.WEIGHT_NORM!r} is not accepted with "
            f"DEFORM_ON_PER_STAGE {list(node.DEFORM_ON_PER_STAGE)!r}; use ''"
        )
    if node.NORM in (*BATCH_NORMS, *BASELINES):
        assert not isinstance(make, str)  # which it is for no norm
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.RESNETS.NORM = "BN"
        resnet = convert_resnet(cfg, build_resnet_backbone(stock, input_shape), make)
    else:
        resnet = build_resnet_backbone(cfg, input_shape)
    normalize_convolutions(resnet, node.WEIGHT_NORM)
    return resnet


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return build_fpn(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=make_part_norm(cfg, "FPN"),
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        weight_norm=cfg.MODEL.FPN.WEIGHT_NORM,
    )


def build_fpn(*, bottom_up: Backbone, weight_norm: str = "", **kwargs: Any) -> FPN:
    """Detectron2's FPN, whose convolutions may have normalized weights.

    Args:
        bottom_up: of Detectron2, or of :func:`build_nf_bottom_up`.
        weight_norm: a name for :func:`bn_det.normalize_weight`.
        kwargs: as of ``FPN``.
    """
    fpn = FPN(bottom_up=bottom_up, **kwargs)
    normalize_pyramid(
        fpn.lateral_convs,
        fpn.output_convs,
        fpn.top_block,
        weight_norm,
        after_relu=not isinstance(bottom_up, NFBackbone),
    )
    return fpn


def build_nf_bottom_up(
    name: str = "nf_resnet50",
    pretrained: str = "",
    drop_path_rate: float = 0.0,
    freeze_at: int = 0,
) -> NFBackbone:
    """A normalizer-free net in place of a ResNet; arguments and errors as of ``make_nf``."""
    return make_nf(name, pretrained, drop_path_rate, freeze_at, _NFBackbone, key="pretrained")
