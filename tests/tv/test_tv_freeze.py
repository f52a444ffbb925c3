"""Freezing and thawing torchvision's detectors."""

import copy

import torch
from torch import nn
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

from bn_det import evaluated_losses, freeze, thaw
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


def test_losses_as_in_evaluation():
    """Of a detector of torchvision as it is: the same each time, and nothing moves."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, trainable_backbone_layers=6
    )
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in norms:
        nn.init.uniform_(layer.running_var, 0.5, 2)
    images = torch.rand(2, 3, 64, 64).unbind()
    targets = [{"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}] * 2
    before, losses = copy.deepcopy(model.train().state_dict()), []
    for _ in range(2):
        with torch.no_grad(), evaluated_losses(model):
            losses.append(model(images, targets))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert norms and all(m.training for m in model.modules())
    with torch.no_grad(), evaluated_losses(freeze(model)):
        torch.testing.assert_close(model(images, targets), losses[0], rtol=1e-4, atol=1e-4)
