"""RoI pooling on the torchvision host."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from bn_det.tv.pooler import RoIPooler

STRIDES = [4, 8, 16, 32]


def pyramid(num_images=2, size=256, channels=3):
    return [torch.randn(num_images, channels, size // s, size // s).double() for s in STRIDES]


def some_boxes(num):
    start = torch.rand(num, 2, dtype=torch.float64) * 100
    return torch.cat([start, start + torch.rand(num, 2) * 150 + 1], 1)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_without_alignment_equals_torchvision(sampling_ratio):
    features, boxes = pyramid(), [some_boxes(30), some_boxes(5)]
    theirs = MultiScaleRoIAlign(["2", "3", "4", "5"], 7, sampling_ratio)
    named = {str(k): f for k, f in enumerate(features, 2)}
    expected = theirs(named, boxes, [(256, 256)] * 2)
    found = RoIPooler(7, STRIDES, sampling_ratio, aligned=False)(features, boxes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_alignment():
    """A box on whole cells of its level, one sample in each: the cells themselves."""
    features = pyramid(1)
    boxes = [torch.tensor([[12.0, 20.0, 40.0, 48.0]]).double()]  # 28 pixels: p2
    found = RoIPooler(7, STRIDES, 1, aligned=True)(features, boxes)
    torch.testing.assert_close(found[0], features[0][0, :, 5:12, 3:10])


@pytest.mark.parametrize(
    "width, height, level",
    [
        *((224, 224, 2), (223, 224, 1), (112, 112, 1), (448, 448, 3), (447.9, 448, 2)),
        *((5, 5, 0), (0, 0, 0), (0, 30, 0), (4000, 4000, 3), (56, 224, 1), (896, 56, 2)),
    ],
)
def test_levels(width, height, level):
    boxes = torch.tensor([[3.0, 4.0, 3 + width, 4 + height]])
    assert RoIPooler(7, STRIDES, 0, True).levels(boxes).tolist() == [level]


def test_without_boxes():
    """The features get a gradient, of zero, at every level."""
    features = [f.requires_grad_() for f in pyramid()]
    pooled = RoIPooler(7, STRIDES, 0, True)(features, [some_boxes(0)] * 2)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(torch.equal(f.grad, torch.zeros_like(f)) for f in features)


def test_order_of_the_boxes():
    """Whatever their levels and images."""
    features = pyramid()
    boxes = [torch.cat([some_boxes(4), torch.tensor([[0.0, 0, 9, 9]]).double()]), some_boxes(3)]
    pooler = RoIPooler(7, STRIDES, 2, True)
    found = pooler(features, boxes)
    in_turn = [(n, box) for n, of_image in enumerate(boxes) for box in of_image]
    for k, (n, box) in enumerate(in_turn):
        level = pooler.levels(box[None])
        one = roi_align(features[level][n : n + 1], [box[None]], 7, 1 / STRIDES[level], 2, True)
        torch.testing.assert_close(found[k], one[0])
