"""A model is called on what its data loader gives."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import retinanet_resnet50_fpn_v2, ssdlite320_mobilenet_v3_large

import bn_det
from bn_det import BatchNorm2d, virtual_batch


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, y):
        return self.norm(x + y)


def pairs(number=4):
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 2, 3, 4, 4, generator=generator)) for _ in range(number)]


def test_a_tuple_is_the_arguments():
    model, expected = Two(), nn.BatchNorm2d(3)
    bn_det.update_bn_stats(model, pairs(), 4)
    bn_det.update_bn_stats(expected, [x + y for x, y in pairs()], 4)
    assert torch.equal(model.norm.running_var, expected.running_var)
    assert (
        bn_det.examine(model, pairs()).layers
        == bn_det.examine(model, pairs(), call=lambda model, batch: model(*batch)).layers
    )


@pytest.mark.parametrize("more", [(), (None,)])
def test_a_tuple_that_is_one_argument(more):
    """Of a forward method that takes no more, or needs no more and may mean the tensors of it."""

    class Sum(Two):
        def forward(self, xs, y=None):
            return super().forward(*xs)

    class One(Sum):
        def forward(self, xs):
            return super().forward(xs)

    model, expected = Sum() if more else One(), Two()
    bn_det.update_bn_stats(model, pairs(), 4)
    bn_det.update_bn_stats(expected, pairs(), 4)
    assert torch.equal(model.norm.running_var, expected.norm.running_var)


def test_virtual_batch_takes_a_tuple():
    (x, y), (extra, more), *_ = pairs()
    found = []
    for call in (None, lambda model, batch: model(*batch)):
        model = Two()
        bn_det.convert_batchnorm(model, BatchNorm2d)
        with virtual_batch(model, (extra, more), call):
            found.append(model(x, y))
    assert torch.equal(*found)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, targets=None, mode: str = "loss"):
        return self.norm(images).mean((2, 3)) + targets


X, Y = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
THEIRS = "and its forward method takes (images, targets=None, mode='loss'); "
MEANT = "if a batch is these, say so by call=lambda model, batch: model({}batch)"
ELSE = "if a batch is something else, say so by call=lambda model, batch: ..."


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize(
    "batch, how, meant",
    [
        ([X, Y], "batch), where a batch is a list of 2", MEANT.format("*")),
        ((X, Y), "batch), where a batch is a tuple of 2", MEANT.format("*")),
        ((X, {}), "*batch), where a batch is a tuple of 2", ELSE),
        ({"images": X, "targets": Y}, "batch), where a batch is a dict of 2",
         MEANT.format("**")),
        ({"image": X}, "batch), where a batch is a dict of 1", ELSE),
        ([X] * 4, "batch), where a batch is a list of 4", ELSE),
    ],
)  # fmt: skip
def test_what_is_said_where_it_takes_something_else(batch, how, meant):
    """The model's own error, with how it was called, and what may have been meant."""
    model = Named()
    with pytest.raises((AttributeError, TypeError)) as raised:
        bn_det.update_bn_stats(model, [batch], 1)
    (note,) = raised.value.__notes__
    assert note == f"The model was called as model({how}, {THEIRS}{meant}"
    if meant is not ELSE:
        call = eval(meant.partition("call=")[2])
        assert bn_det.update_bn_stats(model, [batch], 1, call=call).num_batches == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_nothing_is_said_of_a_batch_of_one_argument():
    with pytest.raises(AttributeError) as raised:
        bn_det.update_bn_stats(nn.BatchNorm2d(3), [5], 1)
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("make", [retinanet_resnet50_fpn_v2, ssdlite320_mobilenet_v3_large])
def test_detectors_of_torchvision(make):
    """On batches as its reference training makes them."""
    sample = torch.rand(3, 64, 64), {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]),
    }  # fmt: skip
    loader = DataLoader([sample] * 4, 2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    sizes = {} if make is ssdlite320_mobilenet_v3_large else {"min_size": 64, "max_size": 64}
    model = make(weights=None, weights_backbone=None, num_classes=2, **sizes).train()
    report = bn_det.update_bn_stats(model, loader, 2)
    assert report.num_batches == 2 and not report.unused


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_what_is_said_of_detectors_of_torchvision_without_targets():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).train()
    image = torch.rand(3, 64, 64)
    for batch, meant in (
        ([image] * 3, ELSE),  # images alone
        ([(image, {})] * 3, ELSE),  # pairs that nothing has collated
        ([[image], [{}]], MEANT.format("*")),  # what another collate_fn makes
    ):
        with pytest.raises(AssertionError, match="targets should not be none") as raised:
            bn_det.update_bn_stats(model, [batch], 1)
        (note,) = raised.value.__notes__
        assert (
            f"a list of {len(batch)}, and its forward method takes (images, targets=None)" in note
        )
        assert note.endswith(meant)
