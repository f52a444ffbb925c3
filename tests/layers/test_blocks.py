"""What holds inside a block: for every kind of layer, and not for copies that are made there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from bn_det import (
    BatchNorm2d,
    FrozenBatchNorm,
    L1BatchNorm2d,
    freeze,
    no_population_update,
    trained_with,
)
from bn_det.errors import InputError
from bn_det.layers.blocks import evaluated_with
from kinds import C, fill

LAYERS = {
    nn.BatchNorm1d: (6, C, 5),
    nn.BatchNorm2d: (6, C, 3, 5),
    nn.BatchNorm3d: (6, C, 2, 3, 2),
    BatchNorm2d: (6, C, 3, 5),
}


class Plain(nn.BatchNorm2d):
    pass


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def make_net(kind):
    torch.manual_seed(0)
    net = nn.Sequential(kind(C)).double()
    return fill(net)


def by_population(layer, x):
    state = layer.running_mean, layer.running_var, layer.weight, layer.bias
    return F.batch_norm(x, *(t.detach().clone() for t in state), eps=layer.eps)


def by_batch(layer, x):
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_normalizes(kind):
    """torch's layers are told, too, and are what they were after the block."""
    net, x = make_net(kind), torch.randn(LAYERS[kind], dtype=torch.float64)
    layer, attributes = net[0], set(vars(net[0]))
    expected = by_population(layer, x)
    usual = copy.deepcopy(net)
    usual(x)
    with trained_with(net, "population"):
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.state_dict(), usual.state_dict(), rtol=0, atol=1e-12)
    expected = by_batch(layer, x)
    before = copy.deepcopy(net.state_dict())
    with evaluated_with(net.eval(), "batch"):
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert type(layer) is kind and set(vars(layer)) == attributes and not layer.training


def test_what_is_done_inside_stays():
    """New tensors, hooks, the mode; and an error leaves the layer as it was."""
    net = make_net(nn.BatchNorm2d)
    layer = net[0]
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ZeroDivisionError), trained_with(net, "population"):
        assert isinstance(layer, BatchNorm2d)
        hook = layer.register_forward_hook(lambda *_: None)
        net.float().eval()
        raise ZeroDivisionError
    assert isinstance(layer, nn.BatchNorm2d) and not isinstance(layer, BatchNorm2d)
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float32
    assert hook.id in layer._forward_hooks and not layer.training


@pytest.mark.parametrize(
    "block",
    [no_population_update, lambda m: trained_with(m, "population"),
     lambda m: evaluated_with(m, "batch")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(block, kind, make_copy):
    """A copy that is made inside the block behaves as the layer does outside of it."""
    net, x = make_net(kind), torch.randn(LAYERS[kind], dtype=torch.float64)
    with block(net):
        other = make_copy(net)
    for mode in (True, False):
        y = net.train(mode)(x)
        torch.testing.assert_close(other.train(mode)(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=1e-12)
    assert other[0].num_batches_tracked == 1
    assert other[0].track_running_stats is True


def test_layers_that_cannot_be_told():
    """What they do in training is their own, and they are named; frozen ones stay so."""
    for kind in (WithActivation, L1BatchNorm2d):
        net = make_net(kind)
        words = f"trained_with: 0 is a {kind.__name__}, which cannot be told .*'population'"
        with pytest.raises(InputError, match=words), trained_with(net, "population"):
            pass
        assert type(net[0]) is kind
        with trained_with(net, "batch"):  # as they do in any case
            net(torch.randn(2, C, 3, 3, dtype=torch.float64))
    with trained_with(make_net(Plain), "population"):
        pass
    net = freeze(make_net(WithActivation))
    with trained_with(net, "population"), evaluated_with(net, "batch"):
        pass
    net = freeze(make_net(nn.BatchNorm2d)).eval()
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    expected = net(x)
    with evaluated_with(net, "batch"):
        assert torch.equal(net(x), expected) and type(net[0]) is FrozenBatchNorm


@pytest.mark.parametrize("make", [BatchNorm2d, L1BatchNorm2d])
@pytest.mark.parametrize(
    "key, value",
    [("momentum", -0.1), ("momentum", 1.5), ("momentum", float("nan")), ("eps", -1.0),
     ("eps", float("nan")), ("eps", float("inf"))],
)  # fmt: skip
def test_numbers_that_are_refused(make, key, value):
    with pytest.raises(InputError, match=f"{key}: {value!r} is not accepted; use 0.0"):
        make(C, **{key: value})
    for momentum in (None, 0.0, 1.0):
        make(C, eps=0.0, momentum=momentum)


class Fork(nn.BatchNorm2d):
    """As in older projects: it asks for the flag, and moves its statistics by itself."""

    def forward(self, x):
        if self.training or not self.track_running_stats:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + self.eps).sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_no_update_of_layers_that_move_by_themselves(training):
    layer = Fork(3).train(training)
    x = torch.randn(4, 3, 2, 2) + 5
    expected = copy.deepcopy(layer)(x)
    with no_population_update(layer):
        assert torch.equal(layer(x), expected)
    assert not layer.running_mean.any() and layer.track_running_stats


def test_a_lazy_layer_cannot_be_told():
    with (
        pytest.raises(InputError, match="trained_with: 0: it has not been called yet"),
        trained_with(nn.Sequential(nn.LazyBatchNorm2d()), "population"),
    ):
        pass


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_in_a_block_in_a_block(make_copy):
    model = nn.Sequential(BatchNorm2d(C)).train()
    with no_population_update(model), no_population_update(model):
        of_updates = make_copy(model)
    with evaluated_with(model, "batch"), evaluated_with(model, "batch"):
        of_statistics = make_copy(model)
    of_updates(torch.randn(4, C, 2, 2) + 5)
    assert of_updates[0].num_batches_tracked == 1
    assert of_statistics[0].eval_statistics == "population"


def test_what_is_set_on_torchs_layer_stays():
    layer, calls = nn.BatchNorm2d(C), []
    with evaluated_with(layer, "batch"):
        layer.momentum, layer.eps = 0.5, 0.01
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    assert type(layer) is nn.BatchNorm2d and (layer.momentum, layer.eps) == (0.5, 0.01)
    layer(torch.randn(4, C, 2, 2, requires_grad=True)).sum().backward()
    assert calls == [1]
