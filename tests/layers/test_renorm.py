"""Batch renormalization, training by population statistics, and passes that update none."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import (
    BatchNorm2d,
    no_population_update,
    trained_with,
    update_bn_stats,
)
from bn_det.errors import InputError
from kinds import C, call, every_kind, inputs, inputs_of, make, outputs_and_gradients
from ranks import run_ranks


@every_kind
def test_closed_limits_are_batch_normalization(kind):
    found = outputs_and_gradients(ours := make(kind, renorm=(1, 0)), inputs())
    expected = outputs_and_gradients(plain := make(kind), inputs())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


@every_kind
def test_open_limits_give_the_outputs_of_test_time(kind):
    layer = make(kind, renorm=(math.inf, math.inf))
    xs = inputs()
    expected = call(copy.deepcopy(layer).eval(), xs)
    state = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(call(layer, xs), expected, rtol=0, atol=1e-12)
    updated = make(kind)
    updated.load_state_dict(state)
    call(updated, xs)
    torch.testing.assert_close(layer.state_dict(), updated.state_dict(), rtol=0, atol=1e-12)


def by_definition(x, mean, var, weight, bias, r_max, d_max, eps=1e-5):
    """Algorithm 1 of the paper, for one normalization batch."""
    batch_mean, batch_var = reference.mean_var([x])
    std, batch_std = (var + eps).sqrt(), (batch_var + eps).sqrt()
    r = (batch_std.detach() / std).clamp(1 / r_max, r_max)
    d = ((batch_mean.detach() - mean) / std).clamp(-d_max, d_max)
    batch_mean, batch_std, r, d, weight, bias = (
        t.view(-1, 1, 1) for t in (batch_mean, batch_std, r, d, weight, bias)
    )
    return ((x - batch_mean) / batch_std * r + d) * weight + bias


@pytest.mark.parametrize("ghost_size", [None, 2])
@pytest.mark.parametrize("limits", [(1.1, 0.2), (3, 5), (1, 5), (3, 0)])
def test_definition(ghost_size, limits):
    layer = make("plain", renorm=limits)
    layer.ghost_size = ghost_size
    x, other = inputs()[0], inputs()[0]
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    affine = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
    parts = other.split(ghost_size or len(other))
    expected = torch.cat([by_definition(part, mean, var, *affine, *limits) for part in parts])
    (expected**3).sum().backward()
    (y,), grads = outputs_and_gradients(layer, [x])
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-12)
    for got, wanted in zip(grads, [other.grad, *(p.grad for p in affine)], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-9)


def test_gradcheck():
    """Where both corrections are at their limits, and so constant."""
    layer = make("plain", renorm=(1.01, 0.01), update_population=False)
    layer.running_mean.fill_(20)
    layer.running_var.fill_(1e-4)
    x = inputs()[1]

    def run(x, weight, bias):
        own = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, own, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@every_kind
def test_jacobian(kind):
    """The normalization batches are those of batch normalization."""
    found = reference.dependence(lambda xs: call(make(kind, renorm=(2, 1)), xs), inputs_of(kind))
    expected = reference.dependence(lambda xs: call(make(kind), xs), inputs_of(kind))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision(dtype, tolerance):
    """A rounding of a value of up to 8 in the type."""
    layer = make("plain", renorm=(1.5, 0.5)).float()
    x = inputs()[0].detach()
    expected = copy.deepcopy(layer).double()(x)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


def synchronized(rank):
    layer = make("shared-per_domain-shared", renorm=(1.2, 0.3), group="world")
    xs = [x.detach().split([4, 2])[rank].requires_grad_() for x in inputs()]
    ys, grads = outputs_and_gradients(layer, xs)
    return ys, grads[:2], layer.state_dict()


def test_synchronized():
    """Two ranks are as one process with everything, to 1e-10."""
    layer = make("shared-per_domain-shared", renorm=(1.2, 0.3))
    ys, grads = outputs_and_gradients(layer, inputs())
    for rank, (found, of_inputs, state) in enumerate(run_ranks(synchronized, 2)):
        expected = [y.split([4, 2])[rank] for y in ys], [g.split([4, 2])[rank] for g in grads[:2]]
        torch.testing.assert_close((found, of_inputs), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(state, layer.state_dict(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "choices", [{"renorm": (2, 1)}, {"train_statistics": "population"}], ids=str
)
def test_activation_checkpointing_is_refused(choices):
    """A recomputation would be by other population statistics."""
    layer, x = make("plain", **choices), inputs()[0]
    y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot be recomputed in a backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("limits", [(0.5, 1), (2, -1), (math.nan, 1)])
def test_limits_that_are_none(limits):
    with pytest.raises(InputError, match="renorm: .* is not accepted; use .r_max, d_max."):
        BatchNorm2d(C, renorm=limits)


def test_renorm_needs_population_statistics():
    with pytest.raises(InputError, match="track_running_stats"):
        BatchNorm2d(C, renorm=(2, 1), track_running_stats=False)(torch.randn(2, C, 2, 2))


@every_kind
def test_training_by_population_statistics(kind):
    """Outputs and gradients of test time; statistics as BatchNorm's training leaves them."""
    layer, plain, frozen = make(kind), make(kind), make(kind).eval()
    with trained_with(layer, "population"):
        found = outputs_and_gradients(layer, inputs())
    expected = outputs_and_gradients(frozen, inputs())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    call(plain, inputs())
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
    fixed = make(kind, train_statistics="population", update_population=False)
    before = copy.deepcopy(fixed.state_dict())
    torch.testing.assert_close(outputs_and_gradients(fixed, inputs()), expected, rtol=0, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in fixed.state_dict().items())
    assert layer.train_statistics == "batch"


@every_kind
def test_precise_statistics_of_layers_that_do_not_update_them(kind):
    """PreciseBN sees what a layer has seen, whatever normalizes, and whether or not it updates."""
    fixed = {"train_statistics": "population", "update_population": False}
    found, expected = (make(kind, **choices) for choices in (fixed, {}))
    for layer in (found, expected):
        update_bn_stats(layer, [inputs_of(kind)], 1, call=call)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-12)
    assert not torch.equal(
        found.state_dict()[(key := _mean_key(found))], make(kind).state_dict()[key]
    )


@every_kind
@pytest.mark.parametrize("by", ["option", "context"])
def test_no_population_update(kind, by):
    layer = make(kind, update_population=by == "context")
    before = copy.deepcopy(layer.state_dict())
    xs = inputs()
    if by == "context":
        with no_population_update(layer):
            found = call(layer, xs)
    else:
        found = call(layer, xs)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    torch.testing.assert_close(found, call(make(kind), xs), rtol=0, atol=1e-12)
    if by == "context":
        call(layer, xs)
        assert not torch.equal(before[(key := _mean_key(layer))], layer.state_dict()[key])


def _mean_key(layer):
    return next(key for key in layer.state_dict() if key.endswith("running_mean"))


@every_kind
def test_no_population_update_by_an_infinite_input(kind):
    """Not even by a weight of zero, which infinity would make NaN of."""
    layer, xs = make(kind), inputs_of(kind)
    before = copy.deepcopy(layer.state_dict())
    with no_population_update(layer), torch.no_grad():
        xs[0][0, 0, 0, 0] = math.inf
        call(layer, xs)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_no_population_update_of_torchs_layers(training):
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.SyncBatchNorm(C).eval())
    model[1].train(training)
    x = torch.randn(2, 3, 4, 4)
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with no_population_update(model):
        y = model(x)
    assert torch.equal(y, other(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), no_population_update(model):
        raise ZeroDivisionError
    assert all(m.track_running_stats for m in model[1:])


def test_repr_names_the_choices():
    layer = BatchNorm2d(C, renorm=(3, 5), train_statistics="population", update_population=False)
    for choice in ("renorm=(3, 5)", "train_statistics=population", "update_population=False"):
        assert choice in repr(layer)
