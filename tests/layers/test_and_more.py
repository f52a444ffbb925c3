"""Layers with more in them than a BatchNorm, as timm's have an activation, that become ours."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from bn_det import (
    BatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
    freeze,
    image_sources,
    roi_levels,
    states,
    thaw,
)
from bn_det.layers.freeze import is_frozen
from kinds import TENSOR_KINDS, NormAndMore, fill
from old_torch import not_on_torch_2_4

C = 4
OF_SEVERAL_PROCESSES = ("SyncBatchNorm", "SyncBN")
MAKES = {
    **{name: make for name, make in TENSOR_KINDS.items() if name not in OF_SEVERAL_PROCESSES},
    "renorm": partial(BatchNorm2d, renorm=(2.0, 1.0)),
    "affine of sources": lambda c: SourceBatchNorm2d(c, 2, affine="per_domain"),
}


def made(make):
    """A layer that has been converted, and the same layer before its parts, apart."""
    layer = fill(nn.Sequential(NormAndMore(C, p=0.0))).double()
    norm = nn.BatchNorm2d(C).double()
    norm.load_state_dict({k: v for k, v in layer[0].state_dict().items() if "act" not in k})
    apart = nn.Sequential(convert_batchnorm(norm, make), *copy.deepcopy([*layer[0].children()]))
    return convert_batchnorm(layer, make), apart


def called(model, x):
    x = x.clone().requires_grad_()
    domains = [k % 2 for k in range(len(x))]
    with image_sources(domains), roi_levels(domains):
        y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_is_the_new_layer_and_what_follows(make, training):
    layer, apart = made(make)
    layer.train(training), apart.train(training)
    x = torch.randn(6, C, 5, 3, dtype=torch.float64)
    for a, b in zip(called(layer, x), called(apart, x), strict=True):
        assert torch.equal(a, b)
    statistics = [
        [v for k, v in sorted(model.state_dict().items()) if "running" in k]
        for model in (layer, apart)
    ]
    assert len(statistics[0]) >= 2
    assert all(torch.equal(a, b) for a, b in zip(*statistics, strict=True))


def test_stays_the_object_that_it_is():
    model = fill(nn.Sequential(NormAndMore(C)))
    layer, parameters, keys = model[0], list(model.parameters()), list(model.state_dict())
    hooked = []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    for make in (BatchNorm2d, partial(BatchNorm2d, ghost_size=2)):
        convert_batchnorm(model, make)
        assert model[0] is layer and list(model.state_dict()) == keys
        assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert layer.ghost_size == 2 and list(dict(layer.named_children())) == ["drop", "act"]
    model(torch.randn(4, C, 3, 3))
    assert hooked == [1]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("act", ["none", "frozen"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_copies(make, act, again):
    layer, _ = made(make)
    if act == "frozen":
        freeze(layer)
    copied = again(layer)
    assert type(copied[0]) is type(layer[0]) and is_frozen(copied[0]) == (act == "frozen")
    x = torch.randn(6, C, 5, 3, dtype=torch.float64)
    assert torch.equal(called(copied.eval(), x)[0], called(layer.eval(), x)[0])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_frozen_and_thawed(make):
    """Frozen, it is in training what it is in evaluation, whatever evaluates it."""
    layer, _ = made(make)
    layer.eval()
    x = torch.randn(6, C, 5, 3, dtype=torch.float64)
    expected, kind = called(layer, x)[0], type(layer[0])
    if isinstance(layer[0], BatchNorm2d):
        layer[0].eval_statistics = "batch"
    freeze(layer).train()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    domains = [k % 2 for k in range(len(x))]
    with image_sources(domains), roi_levels(domains):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert {of.statistics for of in states(layer).layers} == {"frozen"}
    thaw(layer)
    assert type(layer[0]) is kind and layer[0].training and not is_frozen(layer[0])


def test_a_frozen_one_stays_frozen():
    model = freeze(fill(nn.Sequential(NormAndMore(C)))).train()
    convert_batchnorm(model, BatchNorm2d)
    assert is_frozen(model[0]) and isinstance(model[0], BatchNorm2d)
    assert thaw(model)[0].training


def test_what_follows_is_still_learned_where_nothing_else_is(caplog):
    """A layer without state takes the place of what normalizes alone, and says so."""
    model = fill(nn.Sequential(NormAndMore(C, p=0.0)))
    convert_batchnorm(model, lambda c: nn.LocalResponseNorm(2))
    assert list(model.state_dict()) == ["0.act.weight"]
    x = torch.randn(2, C, 3, 3)
    expected = model[0].act(nn.LocalResponseNorm(2)(x))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert caplog.messages == ["LocalResponseNorm has no place for what has been learned in 0"]


def test_a_name_that_both_have():
    class Named(BatchNorm2d):
        def __init__(self, c):
            super().__init__(c)
            self.act = nn.Identity()

    model = nn.Sequential(nn.BatchNorm2d(C), NormAndMore(C))
    with pytest.raises(ValueError, match=r"^Named has a child 'act' of its own$"):
        convert_batchnorm(model, Named)
    assert [type(m) for m in model] == [nn.BatchNorm2d, NormAndMore]


@not_on_torch_2_4("makes no whole graph of a layer with a step after it")
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_and_exported(frozen):
    layer, _ = made(BatchNorm2d)
    model = nn.Sequential(nn.Conv2d(3, C, 1).double(), layer)
    (freeze(model).train() if frozen else model.train())
    x = torch.randn(6, 3, 5, 3, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=1e-12)
