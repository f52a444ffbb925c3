"""Virtual batch normalization, against one batch of which a part needs no gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import BatchNorm2d, virtual_batch
from bn_det.errors import InputError
from kinds import SOURCES, C, call, every_kind, inputs_of, make
from ranks import run_ranks

EXTRA = 3


def extra_of(kind):
    """Fewer images than real ones; of source 1 and 0 for the layer that asks for it."""
    return [x.detach()[:EXTRA] * 2 + 1 for x in inputs_of(kind, seed=5)]


def run_extra(layer, xs):
    return call(layer, xs, SOURCES[:EXTRA])


def joined(layer, xs, extra):
    """The layer on real and extra images as one batch: the outputs of the real ones."""
    both = [torch.cat([x, e]) for x, e in zip(xs, extra, strict=True)]
    ys = call(layer, both, SOURCES + SOURCES[:EXTRA])
    return [y[: len(x)] for y, x in zip(ys, xs[: len(ys)], strict=True)]


every_whole_kind = pytest.mark.parametrize("kind", [k for k in every_kind.args[1] if k != "ghost"])


@every_whole_kind
def test_one_layer(kind):
    """Outputs, gradients and EMA are those of the joined batch, in float64 to 1e-10."""
    ours, whole = make(kind), make(kind)
    xs, others = inputs_of(kind), inputs_of(kind)
    extra = extra_of(kind)
    with virtual_batch(ours, extra, run_extra):
        ys = call(ours, xs)
        sum((y**3).sum() for y in ys).backward()
    expected = joined(whole, others, extra)
    sum((y**3).sum() for y in expected).backward()
    for y, e in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, e, rtol=0, atol=1e-10)
    for x, o in zip(xs, others, strict=True):
        torch.testing.assert_close(x.grad, o.grad, rtol=0, atol=1e-10)
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=0, atol=1e-10)
    # The block leaves nothing behind.
    after = [y.detach() for y in call(ours, xs)]
    fresh = make(kind)
    torch.testing.assert_close(after, [y.detach() for y in call(fresh, xs)], rtol=0, atol=1e-10)


def test_ghost_batches_have_all_extra_images_each():
    layer = make("ghost")
    (x,), (extra,) = inputs_of("ghost"), extra_of("ghost")
    with virtual_batch(layer, extra):
        y = layer(x)
    for ghost, got in zip(x.split(2), y.split(2), strict=True):
        expected = reference.normalize(
            ghost, *reference.mean_var([ghost, extra]), layer.weight, layer.bias
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@every_kind
def test_jacobian(kind):
    """Of the real images the same depend on each other as without extra ones."""

    def run(layer, xs):
        with virtual_batch(layer, extra_of(kind), run_extra):
            return call(layer, xs)

    found = reference.dependence(lambda xs: run(make(kind), xs), inputs_of(kind))
    expected = reference.dependence(lambda xs: call(make(kind), xs), inputs_of(kind))
    assert torch.equal(found, expected)


def test_images_one_by_one():
    """Each with the same reference batch, as in the paper; even one value has a variance so."""
    layer, extra = make("plain"), extra_of("plain")[0]
    with virtual_batch(layer, extra):
        y = layer(x := torch.randn(1, C, 1, 1, dtype=torch.float64))
    expected = reference.normalize(x, *reference.mean_var([x, extra]), layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    with virtual_batch(layer, extra):
        assert layer(x[:0]).shape == (0, C, 1, 1)


class Net(nn.Module):
    """A layer that is called twice, then another; it counts its passes as RetinaNet does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = make("plain"), make("plain")
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.second(torch.relu(self.first(self.first(x) + 1)))


def test_deep_model():
    """Extra images are normalized by themselves, layer by layer; real ones with them."""
    model, x, extra = Net(), inputs_of("plain")[0], extra_of("plain")[0]
    before = copy.deepcopy(model.state_dict())
    with virtual_batch(model, extra):
        assert model.passes == 0
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        y = model(x)
    assert model.passes == 1

    def layer(own, x, e):
        affine = own.weight, own.bias
        alone = reference.normalize(e, *reference.mean_var([e]), *affine)
        return reference.normalize(x, *reference.mean_var([x, e]), *affine), alone

    expected, e = layer(model.first, x, extra)
    expected, e = layer(model.first, expected + 1, e + 1)
    expected, _ = layer(model.second, expected.relu(), e.relu())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


def test_more_calls_than_extra_images_had():
    model, (x,), (extra,) = Net(), inputs_of("plain"), extra_of("plain")
    message = r"first is called more often .* \(2 times\); a block is"
    with pytest.raises(InputError, match=message), virtual_batch(model, extra):
        model(x)
        model(x)
    model(x)  # outside of the block it is as before


def test_a_pass_of_extra_images_that_fails():
    model, (x,) = Net(), inputs_of("plain")
    with pytest.raises(RuntimeError), virtual_batch(model, torch.randn(2, C + 1, 3, 3)):
        pass
    assert model.passes == 0 and torch.equal(model(x), Net()(x))


def test_activation_checkpointing_is_refused():
    model, (x,), (extra,) = Net(), inputs_of("plain"), extra_of("plain")
    with virtual_batch(model, extra):
        y = checkpoint(model, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="a virtual batch cannot be recomputed"):
            y.sum().backward()


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Conv2d(C, C, 1)), "no BatchNorm in training mode"),
        (nn.Sequential(BatchNorm2d(C)).eval(), "no BatchNorm in training mode"),
        (nn.Sequential(nn.BatchNorm2d(C)), "0 is a BatchNorm2d; use BatchNorm2d of ours"),
    ],
)
def test_models_without_our_layers(model, message):
    with pytest.raises(InputError, match=message), virtual_batch(model, torch.randn(2, C, 3, 3)):
        pass


def synchronized(rank):
    kind = "shared-shared-shared"
    model = DistributedDataParallel(layer := make(kind, group="world"))
    xs = [x.detach().split([4, 2])[rank].requires_grad_() for x in inputs_of(kind)]
    extra = [e.split([1, 2])[rank] for e in extra_of(kind)]
    with virtual_batch(model, extra):
        ys = model(xs)
        sum((y**3).sum() for y in ys).backward()
    return [y.detach() for y in ys], [x.grad for x in xs], layer.state_dict()


def test_synchronized():
    """Two ranks are as one process with everything, to 1e-10."""
    kind = "shared-shared-shared"
    whole, xs, extra = make(kind), inputs_of(kind), extra_of(kind)
    ys = joined(whole, xs, extra)
    sum((y**3).sum() for y in ys).backward()
    for rank, (found, grads, state) in enumerate(run_ranks(synchronized, 2)):
        for y, got in zip(ys, found, strict=True):
            torch.testing.assert_close(got, y.split([4, 2])[rank], rtol=0, atol=1e-10)
        for x, got in zip(xs, grads, strict=True):
            torch.testing.assert_close(got, x.grad.split([4, 2])[rank], rtol=0, atol=1e-10)
        torch.testing.assert_close(state, whole.state_dict(), rtol=0, atol=1e-10)
