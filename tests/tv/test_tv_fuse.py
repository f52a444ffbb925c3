"""Fused detectors of torchvision: the same outputs, and their export."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import export
from export import (
    check_onnx,
    check_program,
    check_trace,
    fused,
    make_images,
    medium_score,
    num_norms,
)
from reference import BASE, RCNN_BASE, assert_close_by_scale, norm_opts, randomize

NUM_NORMS = {"RetinaNet": 20 + 6 + 4, "Mask R-CNN": 20 + 8 + 1 + 4}
"""Of backbone, FPN and heads."""


make_model = partial(export.make_model, "torchvision")


@pytest.mark.parametrize("population", ["shared", "per_domain"])
def test_retinanet(population):
    """A fused detector predicts the same, without any BatchNorm."""
    before = make_model(BASE, "MODEL.RETINANET.BN.POPULATION", population)
    model = fused(copy.deepcopy(before), NUM_NORMS["RetinaNet"])
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        found, expected = (m.head(list(m.backbone(x).values())) for m in (model, before))
    for name, y in expected.items():
        assert_close_by_scale(found[name], y, name)


@pytest.mark.parametrize("freeze_at", ["0", "3"])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_mask_rcnn(norm, freeze_at):
    """With the norm in backbone, FPN and heads."""
    before = make_model(RCNN_BASE, *norm_opts(norm), "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    model = fused(copy.deepcopy(before), NUM_NORMS["Mask R-CNN"])
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in model.modules())
    images = torch.randn(1, 3, 128, 128)
    rois, mask_rois = torch.randn(5, 64, 7, 7), torch.randn(5, 64, 14, 14)
    with torch.no_grad():
        found, expected = (
            [
                *m.backbone(images).values(),
                m.roi_heads.box_head(rois),
                m.roi_heads.mask_head(mask_rois),
            ]
            for m in (model, before)
        )
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close_by_scale(a, b, str(k))


class Detector(nn.Module):
    """As a function from an image to tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, image):
        (detections,) = self.model([image])
        return tuple(detections.values())


class Network(nn.Module):
    """Backbone and head, which stock torchvision's RetinaNet exports by torch.export, too.

    Selecting detections does not: its code branches on how many there are.
    """

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images):
        return tuple(self.head(list(self.backbone(images).values())).values())


def fused_retinanet():
    return fused(make_model(BASE), NUM_NORMS["RetinaNet"])


def fused_mask_rcnn(norm):
    return fused(make_model(RCNN_BASE, *norm_opts(norm)), NUM_NORMS["Mask R-CNN"])


@pytest.mark.slow
def test_backbone_and_head_of_retinanet_by_torch_export(tmp_path):
    model = Network(fused_retinanet()).eval()
    images = [image[None] for image in make_images()]
    check_program(model, *images)
    check_onnx(model, *images, tmp_path / "a.onnx", dynamo=True)


@pytest.mark.parametrize(
    "make",
    [
        fused_retinanet,
        partial(fused_mask_rcnn, "BN"),
        pytest.param(partial(fused_mask_rcnn, "FrozenBN"), marks=pytest.mark.slow),
    ],
    ids=["RetinaNet", "Mask-RCNN-BN", "Mask-RCNN-FrozenBN"],
)
def test_is_traced_and_exported_to_onnx(make, tmp_path):
    model, images = make(), make_images()
    detector = Detector(model).eval()
    holder = model if hasattr(model, "score_thresh") else model.roi_heads
    holder.score_thresh = 0.0
    holder.score_thresh = medium_score(detector, images)
    check_trace(detector, *images)
    check_onnx(detector, *images, tmp_path / "a.onnx", dynamo=False)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize(
    "kind",
    [RetinaNet, partial(MaskRCNN, rpn_post_nms_top_n_test=20, box_detections_per_img=5)],
    ids=["RetinaNet", "MaskRCNN"],
)
def test_torchvisions_own_is_scripted(kind, norm):
    """Ours cannot be, fused or not: their layers take lists of levels."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, returned_layers=[1, 2, 3, 4]
    )
    model = kind(backbone, 4, min_size=128, max_size=128).eval()
    randomize(model)
    assert num_norms(torch.jit.script(model).graph) > 0
    fused(model, 20)
    scripted = torch.jit.script(model)
    assert num_norms(scripted.graph) == 0
    images = [image / 255 for image in make_images()[:1]]
    with torch.no_grad():
        _, found = scripted(images)
        torch.testing.assert_close(found, model(images), rtol=1e-6, atol=1e-6)
