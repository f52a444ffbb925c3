"""Detectors built from a config."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from ..config.nf import NFBackbone, build_nf
from ..config.parts import NF_BACKBONES, convert_resnet, part_norm
from ..layers import (
    BATCH_NORMS,
    convert_batchnorm,
    name_layers,
    normalize_convolutions,
    normalize_pyramid,
)
from .config import NUM_LEVELS, RCNNS, check_cfg
from .norms import NORMS
from .rcnn import Backbone, build_rcnn
from .retinanet import BNRetinaNetHead

Sizes = tuple[tuple[float, ...], ...]
"""Numbers for each level."""

_STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


def build_model(cfg: CfgNode) -> RetinaNet | GeneralizedRCNN:
    """torchvision's detector with our layers and heads, as the config has it, on MODEL.DEVICE.

    It takes images in the value range and channel order of INPUT.FORMAT, like Detectron2's.
    Classes are counted from 0. Masks come as probabilities (N, 1, M, M) of their boxes' parts.

    Raises:
        InputError: a value that this host does not have.
    """
    check_cfg(cfg)
    transform = _NormalizeAndPad(
        0, 0, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD), size_divisible=32
    )
    is_rcnn = cfg.MODEL.META_ARCHITECTURE in RCNNS
    model = (_build_rcnn if is_rcnn else _build_retinanet)(cfg, transform)
    return name_layers(model.to(cfg.MODEL.DEVICE), cfg.SOLVER.SYNC_BN_TIMEOUT)


def _build_rcnn(cfg: CfgNode, transform: nn.Module) -> GeneralizedRCNN:
    return build_rcnn(cfg, build_backbone(cfg), _anchor_generator(cfg, first_level=2), transform)


def _build_retinanet(cfg: CfgNode, transform: nn.Module) -> RetinaNet:
    backbone = build_backbone(cfg)
    retinanet = cfg.MODEL.RETINANET
    anchors = _anchor_generator(cfg, first_level=3)
    head = BNRetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        retinanet.NUM_CLASSES,
        retinanet.NUM_CONVS,
        part_norm(cfg, "RETINANET", NORMS, len(retinanet.IN_FEATURES)),
        retinanet.WEIGHT_NORM,
        retinanet.DROPOUT,
    )
    model = RetinaNet(
        backbone,
        retinanet.NUM_CLASSES,
        anchor_generator=anchors,
        head=head,
        score_thresh=retinanet.SCORE_THRESH_TEST,
        nms_thresh=retinanet.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        topk_candidates=retinanet.TOPK_CANDIDATES_TEST,
    )
    model.transform = transform
    return model


def build_backbone(cfg: CfgNode) -> Backbone:
    """A ResNet or a normalizer-free net, with a feature pyramid.

    RetinaNet's levels p6 and p7 come from res5; the R-CNNs' p6 is p5 at half the size.
    """
    is_nf = cfg.MODEL.BACKBONE.NAME in NF_BACKBONES
    backbone = (_build_nf_fpn if is_nf else _build_resnet_fpn)(cfg)
    fpn = backbone.fpn
    normalize_pyramid(
        [block[0] for block in fpn.inner_blocks],
        [block[0] for block in fpn.layer_blocks],
        fpn.extra_blocks,
        cfg.MODEL.FPN.WEIGHT_NORM,
        after_relu=not is_nf,
    )
    return backbone


def _build_resnet_fpn(cfg: CfgNode) -> BackboneWithFPN:
    node = cfg.MODEL.RESNETS
    norm = part_norm(cfg, "RESNETS", NORMS) or nn.Identity
    ours = node.NORM in BATCH_NORMS
    body = getattr(resnet, f"resnet{node.DEPTH}")(norm_layer=nn.BatchNorm2d if ours else norm)
    _freeze(body, cfg.MODEL.BACKBONE.FREEZE_AT)
    if ours:  # in what is not frozen
        convert_resnet(cfg, body, norm)
    normalize_convolutions(body, node.WEIGHT_NORM)
    channels = {f: node.RES2_OUT_CHANNELS * 2**k for k, f in enumerate(_STAGES)}
    levels = {_STAGES[f]: f.replace("res", "p") for f in cfg.MODEL.FPN.IN_FEATURES}
    return BackboneWithFPN(body, levels, **_fpn_arguments(cfg, channels))


def _build_nf_fpn(cfg: CfgNode) -> _NFWithFPN:
    body = build_nf(cfg)
    fpn = FeaturePyramidNetwork(**_fpn_arguments(cfg, body.channels))
    return _NFWithFPN(body, fpn, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS)


class _NFWithFPN(nn.Module):
    """What ``BackboneWithFPN`` is for a net that is a sequence of modules."""

    def __init__(
        self, body: NFBackbone, fpn: FeaturePyramidNetwork, in_features: list[str], channels: int
    ) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, channels
        self.levels = {f: f.replace("res", "p") for f in in_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return self.fpn({level: features[f] for f, level in self.levels.items()})


def _fpn_arguments(cfg: CfgNode, channels: dict[str, int]) -> dict[str, Any]:
    return {
        "in_channels_list": [channels[f] for f in cfg.MODEL.FPN.IN_FEATURES],
        "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "extra_blocks": _top_block(cfg, channels["res5"]),
        "norm_layer": part_norm(cfg, "FPN", NORMS),
    }


def _top_block(cfg: CfgNode, res5_channels: int) -> ExtraFPNBlock:
    if cfg.MODEL.META_ARCHITECTURE in RCNNS:
        return LastLevelMaxPool()
    top_block = LastLevelP6P7(res5_channels, cfg.MODEL.FPN.OUT_CHANNELS)
    top_block.use_P5 = False  # torchvision's choice where both have as many channels
    return top_block


class _NormalizeAndPad(GeneralizedRCNNTransform):
    """The model's transform without its resizing, which the data loader has done."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(
        self, result: list[dict[str, Tensor]], *_: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        return result


class _AnchorGenerator(AnchorGenerator):
    """torchvision's anchors, moved by a part of the stride, as Detectron2's OFFSET does.

    Where an image is a few strides wide, as shapes at p6 and p7, it decides which objects the
    anchors can reach. The strides are the network's, also where a level's size is rounded up;
    torchvision would divide the size of the image by the level's.
    """

    def __init__(
        self, sizes: Sizes, aspect_ratios: Sizes, offset: float, strides: list[int]
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        self.offset = offset
        self.strides = strides

    def grid_anchors(
        self, grid_sizes: list[list[int]], strides: list[list[Tensor]]
    ) -> list[Tensor]:
        anchors = super().grid_anchors(grid_sizes, [[s, s] for s in self.strides])
        return [a + self.offset * s for a, s in zip(anchors, self.strides, strict=True)]


def _anchor_generator(cfg: CfgNode, first_level: int) -> AnchorGenerator:
    def of_each_level(values: list[list[float]]) -> Sizes:
        return tuple(map(tuple, values)) * (NUM_LEVELS // len(values))

    return _AnchorGenerator(
        of_each_level(cfg.MODEL.ANCHOR_GENERATOR.SIZES),
        of_each_level(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS),
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        [2 ** (first_level + k) for k in range(NUM_LEVELS)],
    )


def _freeze(body: nn.Module, freeze_at: int) -> None:
    """Freeze the stem (1), the stem and res2 (2), and so on, as Detectron2's FREEZE_AT does."""
    names = ["conv1", "bn1", *_STAGES.values()]
    for name in names[: freeze_at + 1] if freeze_at else []:
        stage = getattr(body, name)
        stage.requires_grad_(False)
        setattr(body, name, convert_batchnorm(stage, FrozenBatchNorm2d))
