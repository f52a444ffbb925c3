"""Passes that leave a model as it is, and those that are found not to."""

import copy
import math

import pytest
import torch
from torch import nn

from bn_det import (
    BatchNorm2d,
    evaluated_losses,
    freeze,
    unchanged_statistics,
    update_bn_stats,
)
from bn_det.errors import InputError
from kinds import call, every_kind, inputs_of, make


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_state(model, before):
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@every_kind
def test_what_moves_is_put_back(kind):
    layer = make(kind)
    before = state_of(layer)
    words = r"unchanged_statistics: .*running_mean, .* moved inside"
    with pytest.raises(InputError, match=words), unchanged_statistics(layer):
        call(layer, inputs_of(kind))
    assert_state(layer, before)
    with pytest.raises(ZeroDivisionError), unchanged_statistics(layer):
        call(layer, inputs_of(kind))
        raise ZeroDivisionError
    assert_state(layer, before)
    with unchanged_statistics(layer):
        call(layer.eval(), inputs_of(kind))
    layer.train()
    with unchanged_statistics(freeze(layer)):
        call(layer, inputs_of(kind))


def test_other_ways_to_move():
    """A buffer that is replaced; NaN that stays is no change; torch's layers, named in a model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    buffer = model[1].running_var
    buffer[1] = math.nan
    before = state_of(model)
    with unchanged_statistics(model):
        model[0].weight.data.zero_()
    words = "unchanged_statistics: 1.running_var moved"
    with pytest.raises(InputError, match=words), unchanged_statistics(model):
        model[1].running_var = torch.ones(4)
    assert model[1].running_var is buffer
    words = "1.num_batches_tracked and 3 more moved"
    with pytest.raises(InputError, match=words), unchanged_statistics(model):
        for layer in model[1:]:
            layer.running_mean += 1
            layer.running_var += 1
            layer.num_batches_tracked += 1
    del before["0.weight"]
    assert_state(model, {"0.weight": model[0].weight.detach(), **before})


def test_modes_and_dropout():
    """As in evaluation, with gradients if they are wanted; modes, also unequal ones, come back."""

    class Detector(nn.Sequential):
        def forward(self, x):
            assert self.training
            return super().forward(x)

    model = Detector(nn.Conv2d(3, 4, 1), BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    model.train()
    model[1].eval()
    x, before = torch.randn(2, 3, 4, 4), state_of(model)
    expected = nn.Sequential(*copy.deepcopy(model)).eval()(x)
    seed = torch.initial_seed()
    with evaluated_losses(model):
        torch.testing.assert_close(model(x), expected)
        model[0].weight.data.zero_()
    assert_state(model, before)
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert torch.initial_seed() == seed
    with pytest.raises(ZeroDivisionError), evaluated_losses(model):
        model.num_calls = 1
        raise ZeroDivisionError
    assert not hasattr(model, "num_calls")


def test_a_buffer_that_a_pass_with_gradients_has_written_into():
    """It is then no leaf, whose flag nobody can set; all values are put back all the same."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            y = self.last(self.norm(x))
            self.mean.mul_(0.9).add_(0.1 * y.square().mean())
            return y

    model = Counts()
    before = state_of(model)
    with evaluated_losses(model):
        model(torch.randn(4, 3, 5, 5))
    assert_state(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_sparse_buffer():
    class Sparse(nn.Sequential):
        def forward(self, x):
            self.seen.mul_(2)
            return super().forward(x)

    model = Sparse(nn.BatchNorm2d(3))
    model.register_buffer("seen", torch.eye(3).to_sparse())
    update_bn_stats(model, [torch.randn(4, 3, 5, 5)], 1)
    assert torch.equal(model.seen.to_dense(), torch.eye(3))
