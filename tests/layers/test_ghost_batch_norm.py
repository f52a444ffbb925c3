"""Normalization batches that are parts of one process's samples."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import BatchNorm2d, DomainBatchNorm2d, ghost_groups
from bn_det.errors import InputError
from bn_det.layers.ghost import ghost_batches
from reference import EIGHT_CHOICES

C = 3
eight_choices = pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64, the order of summation


@pytest.mark.parametrize(
    "num_samples, ghost_size, sizes",
    [
        (8, 2, [2, 2, 2, 2]),
        (9, 2, [2, 2, 2, 3]),
        (11, 4, [4, 7]),
        (3, 4, [3]),
        (1, 1, [1]),
        (0, 4, [0]),
        (5, None, [5]),
    ],
)
def test_sizes(num_samples, ghost_size, sizes):
    assert ghost_batches(num_samples, ghost_size).sizes == sizes


def members(layer, n=7):
    """The Jacobian test: for each sample, the samples that its output depends on."""
    x = torch.randn(n, C, 2, 2).double()
    return reference.dependence(lambda xs: [layer(xs[0])], [x])


def test_jacobian():
    layer = BatchNorm2d(C, ghost_size=3).double()
    contiguous = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    assert torch.equal(members(layer), contiguous)
    layer.ghost_order = "random"
    found = members(layer)
    assert sorted(found.sum(1).tolist()) == [3, 3, 3, 4, 4, 4, 4] and torch.equal(found, found.T)
    assert not torch.equal(found, contiguous)
    groups = torch.tensor([5, 0, 5, 2, 0, 2, 2])
    with ghost_groups(layer, groups):
        assert torch.equal(members(layer), groups[:, None] == groups)
        inner = torch.tensor([1, 1, 0, 0, 0, 1, 1])
        with ghost_groups(layer, inner):
            assert torch.equal(members(layer), inner[:, None] == inner)
        assert torch.equal(members(layer), groups[:, None] == groups)
    assert not torch.equal(members(layer), groups[:, None] == groups), "gone after the block"
    assert torch.equal(members(layer.eval()), torch.eye(7).bool())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_definition(memory_format):
    layer = BatchNorm2d(C, ghost_size=4).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (torch.randn(11, C, 3, 2).double() * 2 + 5).contiguous(memory_format=memory_format)
    x.requires_grad_()
    direction = torch.randn_like(x)
    y = layer(x)
    inputs = [x, layer.weight, layer.bias]
    grads = torch.autograd.grad(y, inputs, direction)
    parts = [x[:4], x[4:]]
    theirs = torch.cat(
        reference.domain_batch_norm(parts, [layer.weight] * 2, [layer.bias] * 2, "per_domain")
    )
    close(y, theirs)
    for found, wanted in zip(grads, torch.autograd.grad(theirs, inputs, direction), strict=True):
        close(found, wanted)
    # one update with the mean over batches, weighted by samples
    statistics = [reference.unbiased([p]) for p in parts]
    mean, var = (4 / 11 * a + 7 / 11 * b for a, b in zip(*statistics, strict=True))
    close(layer.running_mean, 0.1 * mean.detach())
    close(layer.running_var, 0.9 + 0.1 * var.detach())
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("n", [2, 3])
def test_one_batch_is_plain_batch_norm(n):
    x = torch.randn(n, C, 3, 2)
    ours, theirs = BatchNorm2d(C, ghost_size=2), nn.BatchNorm2d(C)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_gradcheck():
    layer = BatchNorm2d(C, ghost_size=2, affine=False).double()
    x = torch.randn(5, C, 2, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


def test_empty():
    layer = BatchNorm2d(C, ghost_size=2)
    for groups in (None, torch.zeros(0, dtype=torch.int64)):
        x = torch.randn(0, C, 4, 4, requires_grad=True)
        y = layer(x, groups)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape
        assert layer.weight.grad.eq(0).all()
    assert layer.num_batches_tracked == 0 and layer.running_var.eq(1).all()


def test_random_order_is_recomputed_alike():
    layer = BatchNorm2d(C, ghost_size=2, ghost_order="random").double()
    x = torch.randn(6, C, 2, 2).double().requires_grad_()
    direction = torch.randn_like(x)
    torch.manual_seed(5)
    (plain,) = torch.autograd.grad(layer(x), x, direction)
    for use_reentrant in (True, False):
        torch.manual_seed(5)
        x.grad = None
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(direction)
        close(x.grad, plain)


def domain_layer(choices, **kwargs):
    names = ("statistics", "population", "affine")
    layer = DomainBatchNorm2d(C, 2, **dict(zip(names, choices, strict=True)), **kwargs).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@eight_choices
def test_domains(choices):
    layer = domain_layer(choices, ghost_size=2)
    xs = [torch.randn(5, C, 3, 2).double(), torch.randn(5, C, 2, 1).double() + 3]
    affines = [layer.affine_of(k) for k in range(2)]
    ys = layer(xs)
    for part in (slice(0, 2), slice(2, 5)):
        theirs = reference.domain_batch_norm(
            [x[part] for x in xs],
            [a.weight for a in affines],
            [a.bias for a in affines],
            choices[0],
        )
        for y, wanted in zip(ys, theirs, strict=True):
            close(y[part], wanted)
    same = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    nothing = torch.zeros_like(same)
    other = same if choices[0] == "shared" else nothing
    declared = torch.cat([torch.cat([same, other], 1), torch.cat([other, same], 1)])
    assert torch.equal(reference.dependence(layer, xs), declared)


@eight_choices
def test_population_of_domains(choices):
    layer = domain_layer(choices, ghost_size=2)
    xs = [torch.randn(4, C, 3, 2).double(), torch.randn(4, C, 2, 1).double() + 3]
    layer(xs)

    def updated(old, batches, weights):
        both = [reference.unbiased(batch) for batch in batches]
        new = [sum(w * s[i] for w, s in zip(weights, both, strict=True)) for i in range(2)]
        return [0.9 * o + 0.1 * n for o, n in zip(old, new, strict=True)]

    halves = [[x[:2] for x in xs], [x[2:] for x in xs]]
    start = [torch.zeros(C).double(), torch.ones(C).double()]
    of_domain = [[[h[k]] for h in halves] for k in range(2)]
    if choices[:2] == ("shared", "shared"):
        wanted = {0: updated(start, halves, [0.5, 0.5])}
    elif choices[1] == "shared":
        wanted = {0: updated(updated(start, of_domain[0], [0.5] * 2), of_domain[1], [0.5] * 2)}
    else:
        wanted = {k: updated(start, of_domain[k], [0.5] * 2) for k in range(2)}
    for k, (mean, var) in wanted.items():
        close(layer.population_of(k).running_mean, mean)
        close(layer.population_of(k).running_var, var)


def test_random_batches_of_domains_are_of_the_same_samples():
    layer = domain_layer(("shared",) * 3, ghost_size=2, ghost_order="random")
    xs = [torch.randn(6, C, 2, 2).double(), torch.randn(6, C, 1, 2).double()]
    found = reference.dependence(layer, xs)
    first = found[:6, :6]
    assert first.sum() == 12 and torch.equal(found, first.repeat(2, 2))
    with pytest.raises(ValueError, match=r"domains of \[6, 2\] samples .* 'per_domain'"):
        layer([xs[0], xs[1][:2]])


def test_repr():
    assert "normalization_batch=16 contiguous samples" in repr(BatchNorm2d(4, ghost_size=16))
    layer = domain_layer(EIGHT_CHOICES[0], ghost_size=2, ghost_order="random")
    assert "normalization_batch=2 random samples" in repr(layer)
    assert "normalization_batch" not in repr(BatchNorm2d(4))


def test_no_channels():
    x = torch.randn(4, 0, 2, 2)
    assert BatchNorm2d(0, ghost_size=2)(x).shape == x.shape


def test_bad_input():
    for size, accepted in ((0, "1"), (-1, "1"), (2.5, "an integer"), (True, "an integer")):
        words = f"ghost_size: {size} is not accepted; use {accepted}"
        with pytest.raises(InputError, match=words):
            BatchNorm2d(4, ghost_size=size)
    with pytest.raises(InputError, match="ghost_size: 2 is not accepted with group 'world'"):
        BatchNorm2d(4, ghost_size=2, group="world")
    with pytest.raises(InputError, match="ghost_order: 'sorted' .*'contiguous', 'random'"):
        BatchNorm2d(4, ghost_size=2, ghost_order="sorted")
    layer = BatchNorm2d(C)
    with pytest.raises(ValueError, match=r"groups: shape \(3,\) .* 4 samples, use \(4,\)"):
        layer(torch.randn(4, C, 1, 1), torch.zeros(3, dtype=torch.long))
    for groups, kind in (([0, 0, 1, 1], "list"), (torch.zeros(4), "torch.float32")):
        with pytest.raises(InputError, match=f"groups: {kind} .* use a tensor of integers"):
            layer(torch.randn(4, C, 2, 2), groups)
    with pytest.raises(InputError, match="single value per channel"):
        BatchNorm2d(C, ghost_size=1)(torch.randn(4, C, 1, 1))
    with pytest.raises(InputError, match="domain 1: .*single value per channel"):
        domain_layer(("per_domain",) * 3, ghost_size=1)(
            [torch.randn(2, C, 2, 2).double(), torch.randn(2, C, 1, 1).double()]
        )


def test_batch_statistics_in_evaluation():
    x = torch.randn(4, C, 3, 3)
    layer = BatchNorm2d(C, ghost_size=2, eval_statistics="batch").eval()
    theirs = nn.BatchNorm2d(C)
    assert torch.equal(layer(x), theirs(x)), "all samples"
    assert layer.running_var.eq(1).all() and layer.num_batches_tracked == 0
    assert layer(x[:0]).shape == x[:0].shape
    assert "eval_statistics=batch" in repr(layer)
    with pytest.raises(InputError, match="eval_statistics: 'mean' .*'population', 'batch'"):
        BatchNorm2d(C, eval_statistics="mean")


@eight_choices
def test_batch_statistics_of_domains_in_evaluation(choices):
    layer = domain_layer(choices, eval_statistics="batch").eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    xs = [torch.randn(4, C, 3, 2).double(), torch.randn(4, C, 2, 1).double() + 3]
    affines = [layer.affine_of(k) for k in range(2)]
    weights, biases = [a.weight for a in affines], [a.bias for a in affines]
    for y, wanted in zip(
        layer(xs), reference.domain_batch_norm(xs, weights, biases, choices[0]), strict=True
    ):
        close(y, wanted)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
