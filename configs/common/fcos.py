"""FCOS R-50 FPN. Norms are in model.backbone.norm and model.head.norm; here there are none."""

from bn_det.d2 import BNFCOS, BNFCOSHead

from .retinanet import model

model._target_ = BNFCOS
for _key in (
    "anchor_generator",
    "box2box_transform",
    "anchor_matcher",
    "smooth_l1_beta",
    "input_format",
):
    del model[_key]

# Tian et al., FCOS: A Simple and Strong Anchor-free Object Detector, 2020, Sec. 2.2
model.backbone.top_block.in_feature = "p5"
model.backbone.top_block.in_channels = "${..out_channels}"

model.head._target_ = BNFCOSHead
for _key in ("dropout", "num_anchors"):
    del model.head[_key]

model.test_score_thresh = 0.2  # of the root of class score times centerness
model.test_nms_thresh = 0.6
