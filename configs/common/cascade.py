"""Cascade Mask R-CNN R-50 FPN; the box head of each stage has 4 convolutions and 1 more layer."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from bn_det.d2 import BNCascadeROIHeads, BNFastRCNNConvFCHead
from bn_det.d2.lazy import make_norm

from .rcnn import mask_rcnn as model

for _key in ("box_head", "box_predictor", "proposal_matcher"):
    del model.roi_heads[_key]

model.roi_heads.update(
    _target_=BNCascadeROIHeads,
    box_heads=[
        L(BNFastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
            conv_dims=[256] * 4,
            fc_dims=[1024],
            conv_norm=L(make_norm)(name=""),
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=[_w, _w, _w / 2, _w / 2]),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
            test_score_thresh=0.05,
        )
        for _w in (10.0, 20.0, 30.0)
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[_iou], labels=[0, 1], allow_low_quality_matches=False)
        for _iou in (0.5, 0.6, 0.7)
    ],
)
