"""torch.compile takes the layers whole, and computes with them what eager mode does."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bn_det import BatchNorm2d, DomainBatchNorm2d, convert_batchnorm, forward_levels, shuffled
from cases import CASES, assert_same, make_data, make_layer, run
from old_torch import not_on_torch_2_4
from ranks import run_ranks

VALUES = {"cumulative", "groups", "groups on the device", "levels, groups", "sources"}
VALUES |= {"sources of levels", "RoI levels", "RoI levels on the device", "RoI levels, shared"}
"""Cases that depend on the values of a tensor, for which torch leaves a graph."""


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch._dynamo.reset()


def compiled(module, backend="aot_eager", fullgraph=True):
    module.compile(backend=backend, fullgraph=fullgraph)
    return module


def those(names, left_out, reason):
    """Names as parameters, of which one kind does not run on torch 2.4."""
    mark = not_on_torch_2_4(reason)
    return [pytest.param(name, marks=mark if left_out in name else ()) for name in names]


@pytest.mark.parametrize("name", those(CASES, "virtual", "has no weak references in a graph"))
def test_compiled_is_as_eager(name):
    """The statistics that a forward pass updates are not what its backward pass reads, either."""
    case = CASES[name]
    layer, data = make_layer(case), [make_data(case) for _ in range(3)]
    expected = run(case, layer, data, "cpu", torch.float64)
    is_whole = name not in VALUES
    prepare = partial(compiled, backend="aot_eager", fullgraph=is_whole)
    found = run(case, layer, data, "cpu", torch.float64, prepare=prepare)
    for of_call, wanted in zip(found, expected, strict=True):
        assert_same(of_call, wanted, 0)


class Head(nn.Module):
    """A convolution, norm and activation of a RetinaNet head's tower."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(), nn.ReLU())

    def forward(self, xs):
        return forward_levels(self.tower, xs)


class Bottleneck(nn.Module):
    """Of a ResNet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, xs):
        y = self.norm1(self.conv1(xs[0])).relu()
        return [(self.norm2(self.conv2(y)) + xs[0]).relu()]


def shared():
    return DomainBatchNorm2d(4, 3, statistics="shared", population="shared")


MODELS = {
    "head": lambda: Head(shared),
    "ResNet": lambda: convert_batchnorm(Bottleneck(), BatchNorm2d),
    "renorm": lambda: convert_batchnorm(Bottleneck(), partial(BatchNorm2d, renorm=(3.0, 5.0))),
}


def passed(model, size, training):
    """Outputs, gradients and buffers of a pass over levels of a size."""
    generator = torch.Generator().manual_seed(size)
    shapes = [(2, 4, max(size // s, 1), max((size + 2) // s, 1)) for s in (1, 2, 4)]
    xs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    xs = [x.requires_grad_() for x in xs]
    ys = model.train(training)(xs)
    inputs = [*xs[: len(ys)], *model.parameters()]
    grads = torch.autograd.grad([y.square().sum() for y in ys], inputs)
    return [*ys, *grads, *model.buffers()]


@pytest.mark.parametrize("name", those(MODELS, "head", "replaces no field of a named tuple"))
def test_sizes_are_compiled_once(name):
    """Twice: for the first, and then for all."""
    counter = CompileCounterWithBackend("aot_eager")
    plain = MODELS[name]().double()
    model = compiled(copy.deepcopy(plain), counter)
    for training in (True, False):
        counter.frame_count = 0
        for size in (9, 12, 17, 21, 40):
            assert_same(passed(model, size, training), passed(plain, size, training), 1e-12)
        assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", those(MODELS, "head", "replaces no field of a named tuple"))
def test_inductor(name):
    """It adds up in another order."""
    plain = MODELS[name]().double()
    model = compiled(copy.deepcopy(plain), "inductor")
    for size, training in ((9, True), (12, True), (12, False)):
        assert_same(passed(model, size, training), passed(plain, size, training), 1e-11)


def synced(rank):
    """SyncBN of one tensor and of levels, one with fewer samples here than there."""
    results = []
    for make in (lambda: BatchNorm2d(4, group="world"), lambda: Head(synced_levels)):
        plain = make().double()
        model = compiled(copy.deepcopy(plain))
        for step in range(2):
            found = [
                passed_of_rank(m, rank, step, levels=isinstance(plain, Head))
                for m in (model, plain)
            ]
            results.append(found)
    return results


def synced_levels():
    return DomainBatchNorm2d(4, 2, statistics="shared", population="shared", group="world")


def passed_of_rank(model, rank, step, levels):
    generator = torch.Generator().manual_seed(10 * step + rank)
    shapes = [(2 + rank, 4, 5, 5 + step), (2, 4, 2, 3)]
    xs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    xs = [x.requires_grad_() for x in (xs if levels else xs[:1])]
    ys = model(xs) if levels else [model(xs[0])]
    grads = torch.autograd.grad([y.pow(3).sum() for y in ys], [*xs, *model.parameters()])
    return [t.detach() for t in (*ys, *grads, *model.buffers())]


@not_on_torch_2_4("makes no whole graph of a layer whose calls have places")
def test_sync_batch_norm():
    """By functional collectives, in one graph."""
    for results in run_ranks(synced, 2, timeout=300):
        for found, expected in results:
            assert_same(found, expected, 1e-12)


def without_a_graph_on_one(rank):
    """Rank 1 has compiled as often as it may, and goes on in eager mode."""
    layer = BatchNorm2d(4, group="world").double()
    run_it = torch.compile(layer, backend="aot_eager")
    found = [passed_of_rank(run_it, rank, 0, levels=False)]
    stance = "force_eager" if rank else "default"
    with torch.compiler.set_stance(stance):
        found.append(passed_of_rank(run_it, rank, 1, levels=False))
    return found


@not_on_torch_2_4("has no stances")
def test_a_rank_without_a_graph_among_others_with_one():
    ranks = run_ranks(without_a_graph_on_one, 2, timeout=300)
    expected = run_ranks(in_eager_mode, 2)
    for found, wanted in zip(ranks, expected, strict=True):
        for of_step, wanted_of_step in zip(found, wanted, strict=True):
            assert_same(of_step, wanted_of_step, 1e-12)


def in_eager_mode(rank):
    layer = BatchNorm2d(4, group="world").double()
    return [passed_of_rank(layer, rank, step, levels=False) for step in range(2)]


def shuffled_on_ranks(rank):
    plain = shuffled(nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm2d(4))).double()
    model = compiled(copy.deepcopy(plain), fullgraph=False)
    found = []
    for m in (model, plain):
        torch.manual_seed(0)
        found.append(passed_of_rank(m, rank, 0, levels=False))
    return found


@pytest.mark.filterwarnings("ignore")  # of what is no part of a graph
@not_on_torch_2_4("compiles no index_select with out=")
def test_shuffled():
    for found, expected in run_ranks(shuffled_on_ranks, 2, timeout=300):
        assert_same(found, expected, 1e-12)
