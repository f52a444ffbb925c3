import copy

import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import BatchNorm2d


def pair(**kwargs):
    """Ours and torch's with the same random state."""
    theirs = nn.BatchNorm2d(6, **kwargs).double()
    for t in (*theirs.parameters(), *theirs.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
    ours = BatchNorm2d(6, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(layer, x, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    return [y, *grads, *layer.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_equals_torch(kwargs, training, memory_format):
    ours, theirs = (layer.train(training) for layer in pair(**kwargs))
    for _ in range(3):
        x = torch.randn(4, 6, 5, 3, dtype=torch.float64).to(memory_format=memory_format)
        grad = torch.randn_like(x)
        for a, b in zip(run(ours, x, grad), run(theirs, x, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_without_a_counter(momentum):
    ours, theirs = pair(momentum=momentum)
    observed, _ = pair(momentum=momentum)
    observed.load_state_dict(ours.state_dict())
    observed.register_observer(lambda *_: None)
    ghost = BatchNorm2d(6, momentum=momentum, ghost_size=4).double()
    ghost.load_state_dict(ours.state_dict())
    layers = [theirs, ours, observed, ghost]
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    grad = torch.randn_like(x)
    for layer in layers:
        layer.num_batches_tracked = None
    expected, *others = ([t for t in run(layer, x, grad) if t is not None] for layer in layers)
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_large_mean_in_channels_last():
    x = (torch.randn(2, 16, 40, 50) + 1e4).to(memory_format=torch.channels_last)
    layer = BatchNorm2d(16)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    mean, var = reference.mean_var([x.double()])
    expected = reference.normalize(x.double(), mean, var, *torch.tensor([[1.0] * 16, [0.0] * 16]))
    # What float32 leaves of x - mean where x is 1e4: about 1e-3.
    assert (y - expected).abs().max() < 5e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_input(training, dtype):
    layer = BatchNorm2d(6).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 6, 7, 7, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert (layer.weight.grad == 0).all() and (layer.bias.grad == 0).all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_single_value_is_an_error():
    layer = BatchNorm2d(6)
    with pytest.raises(ValueError, match="single value per channel"):
        layer(torch.randn(1, 6, 1, 1))
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activation_checkpointing_updates_once(use_reentrant, memory_format):
    plain, checkpointed = pair()[0], pair()[0]
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64).to(memory_format=memory_format)
    grad = torch.randn_like(x)
    expected = run(plain, x, grad)
    x.requires_grad_()
    y = checkpoint(checkpointed, x, use_reentrant=use_reentrant)
    y.backward(grad)
    found = [y, x.grad, *(p.grad for p in checkpointed.parameters()), *checkpointed.buffers()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_layer_that_was_pickled_before_it_had_hooks():
    layer, x = BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    state = {k: v for k, v in vars(layer).items() if k not in ("_extensions", "_observers")}
    old = BatchNorm2d.__new__(BatchNorm2d)
    old.__setstate__(copy.deepcopy(state))
    torch.testing.assert_close(old(x), layer(x))


def test_jacobian():
    """One normalization batch of all samples in training, each by itself in evaluation."""
    layer = BatchNorm2d(2).double()
    xs = [torch.randn(3, 2, 2, 2, dtype=torch.float64)]
    assert reference.dependence(lambda xs: [layer(xs[0])], xs).all()
    layer.eval()
    assert torch.equal(
        reference.dependence(lambda xs: [layer(xs[0])], xs), torch.eye(3, dtype=torch.bool)
    )


def test_stock_precise_bn():
    """fvcore's hook finds and updates our layer as it does torch's."""
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 6, 1), layer).double() for layer in pair())
    theirs[0].load_state_dict(ours[0].state_dict())
    data = [torch.randn(n, 3, 4, 4, dtype=torch.float64) for n in (2, 3, 5)]
    for model in (ours, theirs):
        update_bn_stats(model, data, num_iters=3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.contiguous(memory_format=torch.channels_last), None),
        lambda x: (x[:, :, ::2], None),
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
    ],
    ids=["channels_last", "strided", "groups"],
)
def test_two_calls_by_different_ways(other):
    """The second updates statistics that the first has given to torch's function."""
    layer, stock = BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 4, 4)
    second, groups = other(x)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    ((layer(found) ** 3).sum() + (layer(second, groups) ** 3).sum()).backward()
    ((stock(expected) ** 3).sum() + (stock(second) ** 3).sum()).backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.running_var, stock.running_var, rtol=1e-5, atol=1e-6)
