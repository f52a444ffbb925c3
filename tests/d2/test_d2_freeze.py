"""Freezing, thawing and converting the layers that Detectron2 has."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from torch import nn

from bn_det import BatchNorm2d, convert_batchnorm, evaluated_losses, freeze, thaw
from bn_det.layers.freeze import is_frozen
from d2_models import STOCK_RETINANET, make_batch
from export import make_model
from kinds import fill
from reference import BASE, RCNN_BASE

C = 4


@pytest.mark.parametrize("kind", ["BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N"])
def test_its_norms(kind):
    """In training each is then what Detectron2 makes of it by convert_frozen_batchnorm."""
    model = fill(nn.Sequential(nn.Conv2d(3, C, 1), get_norm(kind, C)))
    expected = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 3, 5, 5)
    freeze(model).train()
    torch.testing.assert_close(model(x), expected(x))
    thaw(model)
    assert type(model[1]) is type(get_norm(kind, C)) and model[1].weight.requires_grad


def test_a_frozen_batch_norm_learns_again():
    """The function of test time stays; in training it is a BatchNorm."""
    model = fill(nn.Sequential(nn.Conv2d(3, C, 1), FrozenBatchNorm2d(C, eps=1e-3)))
    before = copy.deepcopy(model)
    assert is_frozen(model[1]) and not is_frozen(thaw(copy.deepcopy(model))[1])
    layer = model[1]
    thaw(model)
    assert model[1] is layer and isinstance(layer, nn.BatchNorm2d)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model.eval()(x), before(x), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert layer.num_batches_tracked == 1
    assert not torch.equal(layer.weight, before[1].weight)
    model.load_state_dict(FrozenBatchNorm2d.convert_frozen_batchnorm(model).state_dict())
    freeze(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("tracked")}
    before.load_state_dict(state)
    torch.testing.assert_close(model(x), before(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("affine", [True, False])
def test_the_affine_of_a_cycle_of_layers(affine):
    """It has weight and bias, which its layers have not."""
    model = nn.ModuleDict({"norm": CycleBatchNormList(3, num_features=C)})
    freeze(model, affine=affine)
    assert {p.requires_grad for p in model.parameters()} == {not affine}
    assert all(is_frozen(layer) for layer in model.norm)
    x = torch.randn(2, C, 3, 3)
    for _ in range(3):
        model.norm.train()(x)
    assert not any(layer.running_mean.any() for layer in model.norm)
    thaw(model)
    assert all(p.requires_grad for p in model.parameters())
    model.norm(x)
    assert model.norm[0].running_mean.any()


def test_a_stock_retinanet():
    """In training its features and head are those of evaluation, and no buffer moves."""
    model = fill(make_model("detectron2", BASE, *STOCK_RETINANET))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.05)
    images, expected = torch.randn(1, 3, 128, 128), None
    for of in (copy.deepcopy(model).eval(), freeze(model).train()):
        before = copy.deepcopy(of.state_dict())
        with torch.no_grad():
            found = of.head(list(of.backbone(images).values()))
        if expected is not None:
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        expected = found
        for key, value in of.state_dict().items():
            assert torch.equal(value, before[key]), key
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("norm" in name for name in learning) and learning


def test_naive_sync_batch_norm_becomes_ours(caplog):
    model = fill(nn.Sequential(NaiveSyncBatchNorm(C), FrozenBatchNorm2d(C)))
    x = torch.randn(2, C, 3, 3)
    expected = model.eval()(x)
    convert_batchnorm(model, BatchNorm2d)
    assert [type(m) for m in model] == [BatchNorm2d, FrozenBatchNorm2d]
    torch.testing.assert_close(model(x), expected)
    assert not caplog.messages


@pytest.mark.parametrize("base", [BASE, RCNN_BASE])
def test_losses_as_in_evaluation(base):
    """The same each time, of population statistics; what the model counts stays, too."""
    model = make_model("detectron2", base)
    batch, before = make_batch([3, 2]), copy.deepcopy(model.train().state_dict())
    normalizer = getattr(model, "loss_normalizer", None)
    losses = []
    for _ in range(2):
        with torch.no_grad(), evaluated_losses(model):
            losses.append(model(batch))
    assert losses[0].keys() >= {"loss_cls", "loss_box_reg"}
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training and getattr(model, "loss_normalizer", None) == normalizer
    with torch.no_grad(), evaluated_losses(freeze(model)):
        frozen = model(batch)
    torch.testing.assert_close(frozen, losses[0], rtol=1e-3, atol=1e-3)
