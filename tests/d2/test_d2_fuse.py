"""Fused detectors of Detectron2: the same outputs, and their export."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial

import torch
from detectron2.export import TracingAdapter
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

import export
from bn_det import fuse
from d2_models import STOCK_RETINANET
from export import check_onnx, check_program, check_trace, fused, make_images, medium_score
from reference import BASE, RCNN_BASE, assert_close_by_scale, norm_opts

STOCK_RCNN = [
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RPN.HEAD_NAME", "StandardRPNHead", "MODEL.RPN.NORM", ""),
]
NUM_NORMS = {"RetinaNet": 20 + 6 + 4, "Mask R-CNN": 20 + 8 + 1 + 4}
"""Of backbone, FPN and heads."""


make_model = partial(export.make_model, "detectron2")


@pytest.mark.parametrize("population", ["shared", "per_domain"])
def test_retinanet(population):
    """A fused detector detects the same, without any BatchNorm, and its plain lists are fused."""
    opts = ["MODEL.RETINANET.BN.POPULATION", population, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    before = make_model(BASE, *opts)
    model = fused(copy.deepcopy(before), NUM_NORMS["RetinaNet"])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    images = make_images()
    with torch.no_grad():
        features = [m.backbone(images[0][None] / 64 - 2) for m in (model, before)]
        for name, x in features[1].items():
            assert_close_by_scale(features[0][name], x, name)
        found, expected = (m([{"image": x} for x in images]) for m in (model, before))
    for a, b in zip(found, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_stock_retinanets_head_is_left_alone():
    """Which layer of CycleBatchNormList a level gets is decided by the number of calls before."""
    before = make_model(BASE, *STOCK_RETINANET)
    model = copy.deepcopy(before)
    report = fuse(model)
    cycles = [n for n, m in model.named_modules() if isinstance(m, CycleBatchNormList)]
    assert set(report.left) == {f"{name}.{k}" for name in cycles for k in range(5)}
    assert all("not certain" in reason for reason in report.left.values())
    assert len(cycles) == 4 and len(report.fused) == 20 + 6
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        outputs = [m.head(list(m.backbone(images).values())) for m in (model, before)]
    for found, expected in zip(*map(sum_lists, outputs), strict=True):
        assert_close_by_scale(found, expected)


def sum_lists(lists):
    return [x for xs in lists for x in xs]


@pytest.mark.parametrize("stock", [[], STOCK_RCNN], ids=["ours", "stock"])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "naiveSyncBN"])
def test_mask_rcnn(norm, stock):
    """With the norm in backbone, FPN and heads."""
    if norm == "naiveSyncBN" and not stock:
        norm = "BN"  # as our parts do not have it, frozen stages beside them
        stock = ["MODEL.BACKBONE.FREEZE_AT", "3"]
    before = make_model(RCNN_BASE, *norm_opts(norm), *stock)
    if norm == "naiveSyncBN":
        assert isinstance(before.roi_heads.mask_head.mask_fcn1.norm, NaiveSyncBatchNorm)
    number = NUM_NORMS["Mask R-CNN"] - (stock is STOCK_RCNN)  # whose RPN has none
    model = fused(copy.deepcopy(before), number)
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in model.modules())
    images = torch.randn(1, 3, 128, 128)
    rois, mask_rois = torch.randn(5, 64, 7, 7), torch.randn(5, 64, 14, 14)
    with torch.no_grad():
        found, expected = (
            [
                *m.backbone(images).values(),
                m.roi_heads.box_head(rois),
                m.roi_heads.mask_head.layers(mask_rois),
            ]
            for m in (model, before)
        )
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close_by_scale(a, b, str(k))


def make_adapter(model, images):
    adapter = TracingAdapter(model, [{"image": images[0]}]).eval()
    holder = model if hasattr(model, "test_score_thresh") else model.roi_heads.box_predictor
    holder.test_score_thresh = 0.0
    holder.test_score_thresh = medium_score(adapter, images)
    return adapter


def fused_retinanet():
    return fused(make_model(BASE), NUM_NORMS["RetinaNet"])


class Network(nn.Module):
    """What stock RetinaNet exports by torch.export, too: backbone and head.

    Selecting detections does not: its code branches on how many there are.
    """

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.in_features = model.head_in_features

    def forward(self, images):
        features = self.backbone(images)
        logits, deltas = self.head([features[name] for name in self.in_features])
        return (*logits, *deltas)


def test_retinanet_is_traced():
    images = make_images()
    check_trace(make_adapter(fused_retinanet(), images), *images)


def test_retinanet_is_exported_to_onnx(tmp_path):
    images = make_images()
    adapter = make_adapter(fused_retinanet(), images)
    check_onnx(adapter, *images, tmp_path / "a.onnx", dynamo=False)


@pytest.mark.slow
def test_backbone_and_head_of_retinanet_by_torch_export(tmp_path):
    model = Network(fused_retinanet())
    images = [image[None] for image in make_images()]
    check_program(model, *images)
    check_onnx(model, *images, tmp_path / "a.onnx", dynamo=True)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_mask_rcnn_is_traced(norm):
    """ONNX's runtime refuses stock's pasting of masks, and ours, which is the same code."""
    images = make_images()
    model = fused(make_model(RCNN_BASE, *norm_opts(norm)), NUM_NORMS["Mask R-CNN"])
    check_trace(make_adapter(model, images), *images)
