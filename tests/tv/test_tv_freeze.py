"""Freezing and thawing torchvision's detectors."""

import copy

import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from bn_det import freeze, thaw
from bn_det.layers.freeze import is_frozen


def test_parts_of_a_detectors_backbone():
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    freeze(model, "backbone.body.layer[123]")
    frozen = {n for n, m in layers.items() if is_frozen(m)}
    assert frozen == {n for n in layers if "layer" in n and "layer4" not in n} != set()
    thaw(model)
    assert not any(is_frozen(m) for m in layers.values())


def test_frozen_batch_norm_becomes_one_that_learns():
    layer = FrozenBatchNorm2d(4)
    for t in layer.buffers():
        nn.init.uniform_(t, 0.5, 2)
    model, x = nn.Sequential(layer), torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(model)(x)
    thaw(model)
    torch.testing.assert_close(model.eval()(x), expected)
    assert isinstance(model[0], nn.BatchNorm2d) and len(list(model.parameters())) == 2
