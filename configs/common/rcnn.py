"""Faster R-CNN and Mask R-CNN, R-50 FPN, with our heads.

Norms are in model.backbone.norm, model.roi_heads.box_head.conv_norm and
model.roi_heads.mask_head.conv_norm; here there are none.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads

from bn_det.d2 import BNFastRCNNConvFCHead, BNMaskRCNNConvUpsampleHead
from bn_det.d2.backbone import build_fpn
from bn_det.d2.lazy import make_norm

from .backbone import resnet as _resnet


def _pooler(size):
    return L(ROIPooler)(
        output_size=size,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


def _pooled(size):
    return L(ShapeSpec)(channels="${....backbone.out_channels}", height=size, width=size)


faster_rcnn = L(GeneralizedRCNN)(
    backbone=L(build_fpn)(
        bottom_up=_resnet,
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
        norm=L(make_norm)(name=""),
        weight_norm="",
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        # in training, and at test time
        pre_nms_topk=[2000, 1000],
        post_nms_topk=[1000, 1000],
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=_pooler(7),
        box_head=L(BNFastRCNNConvFCHead)(
            input_shape=_pooled(7),
            conv_dims=[],
            fc_dims=[1024, 1024],
            conv_norm=L(make_norm)(name=""),
            shuffle=False,
            weight_norm="",
            dropout=0.0,
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)

mask_rcnn = faster_rcnn.copy()
mask_rcnn.roi_heads.update(
    mask_in_features=["p2", "p3", "p4", "p5"],
    mask_pooler=_pooler(14),
    mask_head=L(BNMaskRCNNConvUpsampleHead)(
        input_shape=_pooled(14),
        num_classes="${..num_classes}",
        conv_dims=[256] * 5,  # the last one is the transposed convolution's
        conv_norm=L(make_norm)(name=""),
        shuffle=False,
        weight_norm="",
    ),
)
