"""L1BatchNorm2d against its definition, and what else it has to be a BatchNorm for."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_det import (
    L1BatchNorm2d,
    freeze,
    fuse,
    name_layers,
    no_population_update,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers.freeze import is_frozen
from bn_det.training.hooks import FreezeBN
from reference import dependence, normalize, values

C = 3


def make(**kwargs):
    layer = L1BatchNorm2d(C, **kwargs).double()
    for t in (*layer.parameters(), layer.running_mean, layer.running_var):
        if t is not None:
            nn.init.uniform_(t, 0.5, 1.5)
    return layer


def statistics(x):
    """The mean, and the square of the L1 scale, from all values by channel."""
    v = values([x])
    mean = v.sum(0) / len(v)
    return mean, ((v - mean).abs().sum(0) / len(v)) ** 2 * math.pi / 2


@pytest.mark.parametrize("affine, has_bias", [(True, True), (True, False), (False, False)])
def test_definition(affine, has_bias):
    layer = make(affine=affine)
    if not has_bias:
        layer.register_parameter("bias", None)  # as bias=False of torch 2.14 does
    x = torch.randn(4, C, 3, 5, dtype=torch.float64) * 3 + 2
    weight = layer.weight if affine else torch.ones(C)
    bias = layer.bias if has_bias else torch.zeros(C)
    mean, var = statistics(x)
    before = layer.running_mean.clone(), layer.running_var.clone()
    torch.testing.assert_close(layer(x), normalize(x, mean, var, weight, bias))
    torch.testing.assert_close(layer.running_mean, 0.9 * before[0] + 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 * before[1] + 0.1 * var)


def test_gradients():
    layer = make()
    x = torch.randn(2, C, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_normal_values_are_scaled_as_by_batch_norm():
    """Of 60000 of them, both scales are known to half a percent."""
    x = torch.randn(30, C, 25, 80) * 2 + 1
    torch.testing.assert_close(L1BatchNorm2d(C)(x), nn.BatchNorm2d(C)(x), rtol=0.02, atol=0.02)


def test_evaluation_is_that_of_batch_norm():
    layer, other = make(), nn.BatchNorm2d(C).double()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, C, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=0, atol=0)
    model = nn.Sequential(nn.Conv2d(C, C, 1).double(), copy.deepcopy(layer)).eval()
    expected = model(x)
    assert fuse(model).fused == ["1"]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(freeze(copy.deepcopy(layer)).train()(x), layer(x))


def test_empty_and_single_values():
    for track in (True, False):
        layer = L1BatchNorm2d(C, track_running_stats=track)
        before = copy.deepcopy(layer.state_dict())
        x = torch.zeros(0, C, 4, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape and not layer.weight.grad.any()
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(InputError, match="^a normalization batch of a single value per channel"):
        layer(torch.zeros(1, C, 1, 1))
    model = name_layers(nn.Sequential(L1BatchNorm2d.of_levels(C, 2)))
    with pytest.raises(InputError, match="^0.1: a normalization batch of a single value per chan"):
        model([torch.zeros(1, C, 2, 2), torch.zeros(1, C, 1, 1)])


def test_cumulative_average_and_no_update():
    layer = make(momentum=None)
    layer.reset_running_stats()
    xs = torch.randn(3, 4, C, 2, 2, dtype=torch.float64)
    for x in xs:
        layer(x)
    expected = [torch.stack(s).mean(0) for s in zip(*map(statistics, xs), strict=True)]
    torch.testing.assert_close([layer.running_mean, layer.running_var], expected)
    before = copy.deepcopy(layer.state_dict())
    with no_population_update(layer):
        layer(xs[0])
    # The variance would be another quantity than what the layer normalizes by.
    assert update_bn_stats(layer, list(xs), 3).layers == []
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_activation_checkpointing_updates_once():
    x = torch.randn(4, C, 2, 2, requires_grad=True)
    layer = L1BatchNorm2d(C)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """To a rounding of the output, eight bits in bfloat16; squares of these values overflow."""
    layer = L1BatchNorm2d(C)
    x = (torch.randn(8, C, 4, 4) * 1000).to(dtype)
    expected = normalize(x.double(), *statistics(x.double()), torch.ones(C), torch.zeros(C))
    y = layer(x)
    assert y.dtype == dtype and layer.running_var.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-4)


def test_channels_last():
    x = torch.randn(4, C, 6, 5).to(memory_format=torch.channels_last)
    y = L1BatchNorm2d(C)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, L1BatchNorm2d(C)(x.contiguous()))


def test_normalization_batch():
    """The Jacobian test: all samples in training, none but the own in evaluation."""
    layer, xs = make(), [torch.randn(4, C, 2, 3, dtype=torch.float64)]
    assert dependence(lambda xs: [layer(xs[0])], xs).all()
    layer.eval()
    assert torch.equal(dependence(lambda xs: [layer(xs[0])], xs), torch.eye(4, dtype=torch.bool))


def test_it_can_be_frozen():
    hook, model = FreezeBN(1), nn.Sequential(L1BatchNorm2d(C))
    hook.trainer = type("Trainer", (), {"iter": 2, "model": model})()
    hook.before_step()
    assert is_frozen(model[0])


def test_levels():
    """Each by its own statistics, with one weight and bias."""
    layer = L1BatchNorm2d.of_levels(C, 2).double()
    xs = [torch.randn(2, C, 4 - k, 3, dtype=torch.float64) * (k + 1) + k for k in range(2)]
    torch.testing.assert_close(layer(xs), [L1BatchNorm2d(C).double()(x) for x in xs])
    for one, x in zip(layer, xs, strict=True):
        torch.testing.assert_close(one.running_mean, 0.1 * statistics(x)[0])
    assert len(list(layer.parameters())) == 2
    found = dependence(layer, xs)
    assert torch.equal(found, torch.block_diag(*[torch.ones(2, 2, dtype=torch.bool)] * 2))
