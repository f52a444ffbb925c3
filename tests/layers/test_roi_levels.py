"""Statistics for RoIs of each level, against one layer for each."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import (
    BatchNorm2d,
    RoILevelBatchNorm2d,
    fuse,
    image_sources,
    roi_levels,
    update_bn_stats,
)
from bn_det.errors import InputError
from ranks import run_ranks
from reference import EIGHT_CHOICES

C, LEVELS = 4, 3
BATCHES = {
    "mixed": [2, 0, 1, 0, 0, 2, 1],
    "in order": [0, 0, 0, 1, 2, 2],
    "an empty level": [2, 0, 2, 0],
    "one of a level": [1, 0, 1, 0, 2],
    "one": [1],
    "none": [],
}
every_batch = pytest.mark.parametrize("levels", BATCHES.values(), ids=BATCHES)
every_choice = pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)


def make(choices=("per_domain", "per_domain", "shared"), **kwargs):
    """A layer whose every parameter matters."""
    torch.manual_seed(0)
    named = dict(zip(("statistics", "population", "affine"), choices, strict=True))
    layer = RoILevelBatchNorm2d(C, LEVELS, **named, **kwargs).double()
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return layer


def rois(levels, size=(3, 2), seed=0):
    """RoIs of another scale and mean at each level."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(levels), C, *size, generator=generator, dtype=torch.float64)
    return (x * (1 + torch.tensor(levels).view(-1, 1, 1, 1)) + 3).requires_grad_()


def run(layer, x, levels):
    with roi_levels(torch.tensor(levels, dtype=torch.long)):
        return layer(x)


def of_level(levels, k):
    return [i for i, level in enumerate(levels) if level == k]


class BruteForce(nn.Module):
    """A BatchNorm2d of torch for each level, or for RoIs of all; float64 autograd, by indices."""

    def __init__(self, layer, statistics, population):
        super().__init__()
        self.statistics, self.layer = statistics, layer
        layers = [nn.BatchNorm2d(C, affine=False).double() for _ in range(LEVELS)]
        self.running = nn.ModuleList(layers[:1] if population == "shared" else layers)

    def forward(self, x, levels):
        y = torch.zeros_like(x)
        for k in range(LEVELS):
            mine = torch.tensor(of_level(levels, k), dtype=torch.long)
            if not len(mine):
                continue
            running = self.running[k % len(self.running)]
            if not self.training or self.statistics == "per_domain":
                z = running(x[mine])
            else:
                z = nn.functional.batch_norm(x, None, None, training=True)[mine]
            if self.training and self.statistics == "shared" and len(self.running) > 1:
                running(x[mine].detach())  # the EMA is of the level
            affine = self.layer.affine_of(k)
            z = z * affine.weight.view(-1, 1, 1) + affine.bias.view(-1, 1, 1)
            y = y.index_copy(0, mine, z)
        if self.training and self.statistics == "shared" and len(self.running) == 1 and len(x):
            self.running[0](x.detach())
        return y


@every_batch
@every_choice
def test_a_layer_for_each_level(choices, levels):
    """In float64 the order of sums, 1e-12; of gradients 1e-10."""
    layer = make(choices)
    brute = BruteForce(layer, *choices[:2])
    for training in (True, False):
        layer.train(training), brute.train(training)
        x = rois(levels)
        y, expected = run(layer, x, levels), brute(x, levels)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        if levels:
            direction = torch.randn_like(y)
            inputs = [x, *layer.parameters()]
            found, wanted = (
                torch.autograd.grad(
                    (z * direction).sum(), inputs, allow_unused=True, materialize_grads=True
                )
                for z in (y, expected)
            )
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    for k, own in enumerate(brute.running):
        held = layer.population_of(k)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(held, name), getattr(own, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("statistics", reference.SHARING)
def test_jacobian(statistics):
    """Exactly the RoIs of a level depend on each other, or all do."""
    levels = torch.tensor(BATCHES["mixed"])
    layer = make((statistics, "shared", "shared"))
    found = reference.dependence(lambda xs: [run(layer, xs[0], levels.tolist())], [rois(levels)])
    same = levels[:, None] == levels
    assert torch.equal(found, same if statistics == "per_domain" else torch.ones_like(same))
    layer.eval()
    found = reference.dependence(lambda xs: [run(layer, xs[0], levels.tolist())], [rois(levels)])
    assert torch.equal(found, torch.eye(len(levels)).bool())


def test_ghost_batches_are_of_one_level():
    levels = [0, 2, 0, 2, 0, 0, 1]
    layer = make(ghost_size=2)
    found = reference.dependence(lambda xs: [run(layer, xs[0], levels)], [rois(levels)])
    expected = torch.zeros(7, 7, dtype=torch.bool)
    for batch in ([0, 2], [4, 5], [1, 3], [6]):
        expected[torch.tensor(batch).unsqueeze(1), torch.tensor(batch)] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_precisions_and_memory_formats(dtype, tolerance, memory_format):
    """Within a rounding of a value of up to 8 in the type; the gradient has the format, too."""
    levels = BATCHES["mixed"]
    layer = make().float()
    x = rois(levels).detach().to(dtype, memory_format=memory_format).requires_grad_()
    expected = run(copy.deepcopy(layer).double(), x.double(), levels)
    y = run(layer, x, levels)
    y.sum().backward()
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


def test_activation_checkpointing():
    levels = BATCHES["mixed"]
    layer, x = make(), rois(levels)
    other = copy.deepcopy(layer)
    with roi_levels(torch.tensor(levels)):
        (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
        y = checkpoint(other, x, use_reentrant=False)
        (repeated,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert torch.equal(gradient, repeated)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "levels, message",
    [
        (
            [0, 3, 1],
            "RoI 1 of the batch is of level 3, and the layer knows the levels 0 to 2; name",
        ),
        ([0, 1, -1], "RoI 2 of the batch is of level -1"),
        ([0, 1], "levels of 2 RoIs are named, and the layer got 3 samples: .* those RoIs"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_levels_that_cannot_be(levels, message, training):
    layer = make().train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(InputError, match=message):
        run(layer, rois([0, 0, 0]), levels)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_what_else_is_refused():
    layer, x = make(), rois([0, 0, 1])
    with image_sources([0, 0, 1]), pytest.raises(InputError, match="the RoIs have no levels: name"):
        layer(x)
    with pytest.raises(InputError, match="level 1: a normalization batch of a single value"):
        run(layer, rois([0, 0, 1], (1, 1)), [0, 0, 1])
    with roi_levels([0, 0, 1]), pytest.raises(ValueError, match="groups: not accepted"):
        layer(x, groups=torch.zeros(3))


def test_precise_statistics():
    """The variance of all RoIs of a level, and their number."""
    layer = make(("shared", "per_domain", "shared"))
    batches = [(rois(levels, seed=k), levels) for k, levels in enumerate(BATCHES.values())]
    how = {"call": lambda m, b: run(m, *b), "initial": True}
    report = update_bn_stats(layer, batches, len(batches), **how)
    for k, of_this in enumerate(report.layers):
        mine = [x[of_level(levels, k)] for x, levels in batches]
        mean, var = reference.mean_var(mine)
        torch.testing.assert_close(layer.population_of(k).running_mean, mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(layer.population_of(k).running_var, var, rtol=1e-9, atol=0)
        assert (of_this.name, of_this.num_samples) == (str(k), sum(len(x) for x in mine))


def test_fusing():
    """Only where all levels are the same at test time."""
    for choices in EIGHT_CHOICES:
        head = nn.Sequential(nn.Conv2d(C, C, 1), make(choices)).double().eval()
        before, x, levels = copy.deepcopy(head), rois([0, 1, 2]), [0, 1, 2]
        report = fuse(head)
        torch.testing.assert_close(run(head, x, levels), run(before, x, levels))
        if choices[1:] == ("shared", "shared"):
            assert report.fused == ["1"]
        else:
            assert "of the level of each RoI" in report.left["1"]


RANKS = [[0, 2, 0], [], [2, 2, 1, 0]]
"""The levels of the RoIs of each rank."""


def synchronized(rank, choices):
    layer, x = make(choices, group="world"), rois(RANKS[rank], seed=rank)
    y = run(layer, x, RANKS[rank])
    (y * y * (1 + rank)).sum().backward()
    return y.detach(), x.grad, layer.state_dict()


@pytest.mark.parametrize("statistics", reference.SHARING)
def test_synchronized(statistics):
    """As one process that holds the RoIs of all ranks, one of which has none."""
    choices = (statistics, "per_domain", "per_domain")
    results = run_ranks(synchronized, len(RANKS), choices)
    whole, levels = make(choices), [level for of_rank in RANKS for level in of_rank]
    parts = [rois(of_rank, seed=rank) for rank, of_rank in enumerate(RANKS)]
    x = torch.cat(parts).detach().requires_grad_()
    y = run(whole, x, levels)
    sizes = [len(p) for p in parts]
    sum((z * z * (1 + k)).sum() for k, z in enumerate(y.split(sizes))).backward()
    for rank, (output, grad, state) in enumerate(results):
        torch.testing.assert_close(output, y.split(sizes)[rank], rtol=0, atol=1e-10)
        torch.testing.assert_close(grad, x.grad.split(sizes)[rank], rtol=0, atol=1e-10)
        torch.testing.assert_close(state, whole.state_dict(), rtol=0, atol=1e-10)


def test_repr():
    assert isinstance(make(), BatchNorm2d)
    assert "num_domains=3" in repr(make())
