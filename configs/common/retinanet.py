"""RetinaNet R-50 FPN. Norms are in model.backbone.norm and model.head.norm; here there are none."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher

from bn_det.d2 import BNRetinaNet, BNRetinaNetHead
from bn_det.d2.backbone import build_fpn
from bn_det.d2.lazy import make_norm

from .backbone import resnet as _resnet

_resnet.out_features = ["res3", "res4", "res5"]

model = L(BNRetinaNet)(
    backbone=L(build_fpn)(
        bottom_up=_resnet,
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        norm=L(make_norm)(name=""),
        weight_norm="",
        top_block=L(LastLevelP6P7)(in_channels=2048, out_channels="${..out_channels}"),
    ),
    head=L(BNRetinaNetHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}")] * 5,
        num_classes="${..num_classes}",
        conv_dims=["${...backbone.out_channels}"] * 4,
        norm=L(make_norm)(
            name="",
            num_levels=5,
            statistics="per_domain",
            population="per_domain",
            affine="shared",
        ),
        weight_norm="",
        dropout=0.0,
        prior_prob=0.01,
        num_anchors=9,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x * 2 ** (k / 3) for k in range(3)] for x in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    smooth_l1_beta=0.0,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
