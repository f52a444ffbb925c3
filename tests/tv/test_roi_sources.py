"""RoI heads whose BatchNorm knows the source of the image that each RoI is from."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

import bn_det
from bn_det import SourceBatchNorm2d, image_sources
from bn_det.errors import InputError
from bn_det.tv.sources import name_roi_sources

C, SIZE = 4, 3
BOXES = [torch.rand(n, 2).repeat(1, 2) * 20 + torch.tensor([0, 0, 9, 9]) for n in (3, 1, 4)]
"""Of three images, of which the first and the last are of one source."""
SOURCES = [0, 1, 0]


def make(mask=False):
    head = FastRCNNConvFCHead((C, SIZE, SIZE), [C], [5], nn.BatchNorm2d)
    of_mask = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)) if mask else None
    pools = [MultiScaleRoIAlign(["0"], SIZE, 2) for _ in range(2)]
    numbers = (0.5, 0.5, 16, 0.25, None, 0.0, 0.5, 9)
    masks = (pools[1], of_mask, nn.Conv2d(C, 2, 1)) if mask else ()
    heads = RoIHeads(pools[0], head, FastRCNNPredictor(5, 2), *numbers, *masks)
    bn_det.convert_batchnorm(heads, partial(SourceBatchNorm2d, num_sources=2))
    return name_roi_sources(heads)


def run(heads, sources=SOURCES):
    """What a box head gives for the RoIs of three images, and what it is given."""
    features = {"0": torch.randn(3, C, 16, 16, generator=torch.Generator().manual_seed(1))}
    with image_sources(sources):
        rois = heads.box_roi_pool(features, BOXES, [(32, 32)] * 3)
        return heads.box_head(rois), rois


def test_each_source_is_normalized_by_itself():
    heads = make()
    found, rois = run(heads)
    conv, norm = heads.box_head[0][0], heads.box_head[0][1]
    y = conv(rois)
    of_source = [torch.cat([y[:3], y[4:]]), y[3:4]]
    for k, values in enumerate(of_source):
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
        assert torch.allclose(norm.population_of(k).running_mean, 0.1 * mean, atol=1e-6)
        assert torch.allclose(norm.population_of(k).running_var, 0.9 + 0.1 * var, atol=1e-6)
    expected = torch.empty_like(y)
    for rows, values in zip(([0, 1, 2, 4, 5, 6, 7], [3]), of_source, strict=True):
        expected[rows] = nn.functional.batch_norm(values, None, None, training=True, eps=norm.eps)
    after = nn.Sequential(*list(heads.box_head)[1:])
    assert torch.allclose(found, after(expected.relu()), atol=1e-5)


def test_without_sources_nothing_changes():
    heads = make()
    stock = FastRCNNConvFCHead((C, SIZE, SIZE), [C], [5], nn.BatchNorm2d)
    heads.box_head = stock
    rois = torch.randn(2, C, SIZE, SIZE)
    assert torch.equal(name_roi_sources(heads).box_head(rois), type(stock).forward(stock, rois))


def test_the_mask_head_too():
    heads = make(mask=True)
    features = {"0": torch.randn(3, C, 16, 16)}
    boxes = [BOXES[1], BOXES[0], BOXES[1]]  # as many as are positive, and no other number
    with image_sources(SOURCES):
        rois = heads.mask_roi_pool(features, boxes, [(32, 32)] * 3)
        heads.mask_head(rois)
    expected = 0.1 * heads.mask_head[0](rois)[1:4].mean((0, 2, 3))
    assert torch.allclose(heads.mask_head[1].population_of(1).running_mean, expected, atol=1e-6)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))])
def test_a_copy_has_its_own(how):
    heads = make()
    other = how(heads)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.fill_(0.0)
    out, _ = run(other)
    assert out.any() and not heads.box_head[0][1].population_of(0).num_batches_tracked
    assert other.box_head[0][1].population_of(0).num_batches_tracked == 1


def test_what_is_refused():
    heads = make()
    with pytest.raises(InputError, match="is replaced already; call name_roi_sources once"):
        name_roi_sources(heads)
    with pytest.raises(InputError, match="roi_heads: what is given is of type Conv2d; use the roi"):
        name_roi_sources(nn.Conv2d(1, 1, 1))
    stock = RoIHeads(*(getattr(heads, n) for n in ("box_roi_pool", "box_head", "box_predictor")),
                     0.5, 0.5, 16, 0.25, None, 0.0, 0.5, 9)  # fmt: skip
    del stock.box_head.forward
    with image_sources([0, 1]), pytest.raises(InputError, match="name_roi_sources.model.roi_heads"):
        stock.box_head(torch.randn(5, C, SIZE, SIZE))
