"""Exchange of layers in place: everything that a layer has, and is had by, stays."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

import bn_det
from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
    freeze,
    image_sources,
    roi_levels,
    thaw,
)
from bn_det.layers.and_more import AndMore
from bn_det.layers.freeze import is_frozen
from bn_det.layers.kinds import is_batch_norm
from bn_det.layers.mixed import mixed
from kinds import TENSOR_KINDS, fill
from reference import EIGHT_CHOICES

C = 4
SHAPES = {
    nn.BatchNorm1d: [(6, C), (6, C, 5)],
    nn.BatchNorm2d: [(6, C, 3, 5)],
    nn.BatchNorm3d: [(6, C, 2, 3, 2)],
}
IMAGES_ONLY = ("L1BN", "sources", "RoI levels")


def evaluated(layer, x):
    """In evaluation, whatever the layer has to be told."""
    domains = [k % 2 for k in range(len(x))]
    with torch.no_grad(), image_sources(domains), roi_levels(domains):
        return layer.eval()(x)


@pytest.mark.parametrize("new", TENSOR_KINDS)
@pytest.mark.parametrize("old", TENSOR_KINDS)
def test_between_all_kinds(old, new):
    """There and back: the same function in evaluation, the same objects, mode and settings."""
    layer = TENSOR_KINDS[old](C).double()
    if old in ("sources", "RoI levels"):  # which another kind could not hold apart
        fill(layer.get_submodule("0"))
        layer.get_submodule("1").load_state_dict(layer.get_submodule("0").state_dict())
    fill(layer) if old not in ("sources", "RoI levels") else None
    for holder in (layer, *layer.children()):
        holder.eps, holder.momentum = 0.1, 0.3
    x = torch.randn(4, C, 3, 3, dtype=torch.float64)
    expected, weight = evaluated(copy.deepcopy(layer), x), layer.weight
    model = nn.Sequential(layer, nn.ReLU()).train()
    assert convert_batchnorm(model, TENSOR_KINDS[new]) is model
    assert model[0] is layer and layer.weight is weight and layer.training
    # None of torch's layers takes all that a SyncBatchNorm may have been called with.
    wanted = BatchNorm2d if (old, new) == ("SyncBatchNorm", "torch") else TENSOR_KINDS[new](C)
    assert type(layer) in (wanted, type(wanted))
    assert all((h.eps, h.momentum) == (0.1, 0.3) for h in (layer, *layer.children()))
    torch.testing.assert_close(evaluated(layer, x), expected, rtol=0, atol=1e-12)
    convert_batchnorm(model, TENSOR_KINDS[old])
    torch.testing.assert_close(evaluated(layer, x), expected, rtol=0, atol=1e-12)
    assert layer.weight is weight


@pytest.mark.parametrize("new", TENSOR_KINDS)
@pytest.mark.parametrize("by", ["", "SyncBatchNorm", "ours", "torch's function"])
@pytest.mark.parametrize("kind", SHAPES)
def test_other_inputs_than_images(kind, by, new, caplog):
    """A BatchNorm1d goes on taking what it takes, by way of SyncBatchNorm, too."""
    model = fill(nn.Sequential(kind(C))).double()
    xs = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES[kind]]
    expected = [evaluated(copy.deepcopy(model[0]), x) for x in xs]
    if by == "torch's function":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif by:
        convert_batchnorm(model, TENSOR_KINDS[by])
    before = type(model[0])
    convert_batchnorm(model, TENSOR_KINDS[new])
    if new in IMAGES_ONLY and kind is not nn.BatchNorm2d and by != "torch's function":
        assert type(model[0]) is before and "convert_batchnorm has left 0: it takes" in caplog.text
    elif new in IMAGES_ONLY and kind is not nn.BatchNorm2d:
        return  # nobody can know: the error comes with the first call
    else:
        assert isinstance(model[0], type(TENSOR_KINDS[new](C))) or new == "torch"
    for x, y in zip(xs, expected, strict=True):
        torch.testing.assert_close(evaluated(model[0], x), y, rtol=0, atol=1e-12)
    if not isinstance(model[0], nn.SyncBatchNorm):  # which trains on GPUs alone
        with image_sources([0, 1] * 3), roi_levels([0, 1] * 3):
            model.train()(xs[0])


@pytest.mark.parametrize("new", EIGHT_CHOICES)
@pytest.mark.parametrize("old", EIGHT_CHOICES)
def test_between_layers_of_levels(old, new):
    """Shared statistics become those of each level; apart, they cannot become shared ones."""

    def make(choices):
        names = ("statistics", "population", "affine")
        return DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)))

    layer = fill(make(old)).double().eval()
    xs = [torch.randn(2, C, k, k, dtype=torch.float64) for k in (4, 2, 1)]
    expected, state = layer(xs), copy.deepcopy(layer.state_dict())
    for part, name in ((1, "running_mean"), (2, "weight")):
        if (old[part], new[part]) == ("per_domain", "shared"):
            with pytest.raises(ValueError, match=f"cannot hold the {name} .*have different ones"):
                convert_batchnorm(layer, lambda _: make(new))
            assert layer.population == old[1], "nothing is changed"
            torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
            return
    convert_batchnorm(layer, lambda _: make(new))
    assert (layer.statistics, layer.population, layer.affine_sharing) == new
    torch.testing.assert_close(layer(xs), expected, rtol=0, atol=1e-12)
    layer.train()(xs)
    number = 3 if new[1] == "per_domain" else 1
    moved = {id(layer.population_of(k).running_mean) for k in range(3)}
    assert len(moved) == number, "each has buffers of its own"


def test_everything_stays():
    """Places, hooks, parameters, order of the state dict, places in a plain list."""
    shared = nn.BatchNorm2d(C)
    model = nn.Sequential(
        nn.Conv2d(3, C, 1),
        nn.Sequential(shared),
        nn.BatchNorm2d(C, affine=False).eval(),
        shared,
        nn.BatchNorm2d(C, track_running_stats=False),
    )
    model.in_a_list = [shared]
    fill(model).double()
    before, parameters = copy.deepcopy(model), list(model.parameters())
    calls = []
    shared.register_forward_hook(lambda *_: calls.append("after"))
    shared.register_forward_pre_hook(lambda *_: calls.append("before"))
    convert_batchnorm(model, BatchNorm2d)
    assert model[1][0] is model[3] is model.in_a_list[0] and type(model[3]) is BatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(before.state_dict())
    assert [m.training for m in model] == [True, True, False, True, True]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), before(x))
    assert calls == ["before", "after"] * 2
    torch.testing.assert_close(model.state_dict(), before.state_dict())


def test_a_parametrized_weight_stays():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = fill(nn.Sequential(nn.BatchNorm2d(C))).double()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(2, C, 3, 3, dtype=torch.float64)
    expected, original = model(x), model[0].parametrizations.weight.original
    convert_batchnorm(model, partial(BatchNorm2d, ghost_size=2))
    assert isinstance(model[0], BatchNorm2d) and model[0].ghost_size == 2
    torch.testing.assert_close(model(x), expected)
    assert dict(model.named_parameters())["0.parametrizations.weight.original"] is original
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is BatchNorm2d
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with pytest.raises(ValueError, match="cannot hold the parametrized weight"):
        convert_batchnorm(model, lambda c: RoILevelBatchNorm2d(c, 2, affine="per_domain"))


def test_an_optimizer_stays_valid():
    model = nn.Sequential(nn.BatchNorm2d(C))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_batchnorm(model, lambda c: SourceBatchNorm2d(c, 2))
    before = model[0].weight.clone()
    with image_sources([0, 1]):
        model(torch.randn(2, C, 3, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(dtype):
    layer = nn.BatchNorm2d(C).to(dtype)
    convert_batchnorm(layer, lambda c: SourceBatchNorm2d(c, 2, affine="per_domain"))
    assert {v.dtype for v in layer.state_dict().values()} == {dtype, torch.long}


def test_a_freeze_is_kept_and_thawed_as_the_new_kind():
    model = freeze(fill(nn.Sequential(nn.BatchNorm1d(C))), affine=False)
    convert_batchnorm(model, partial(BatchNorm2d, ghost_size=3))
    assert is_frozen(model[0]) and model[0].weight.requires_grad
    thaw(model)
    assert type(model[0]) is BatchNorm2d and model[0].ghost_size == 3
    model(torch.randn(6, C))
    assert model[0].num_batches_tracked == 1


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Plain(nn.BatchNorm2d):
    """Which only normalizes, whatever it is called."""


def test_what_is_left_is_named(caplog):
    model = nn.Sequential(
        WithActivation(C),
        Plain(C),
        DomainBatchNorm2d(C, 2),
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(C),
    )
    before = list(model)
    convert_batchnorm(model, BatchNorm2d)
    assert list(model) == before
    kinds = [WithActivation, BatchNorm2d, DomainBatchNorm2d, nn.LazyBatchNorm2d, BatchNorm2d]
    assert [type(m) for m in model] == kinds
    (message,) = caplog.messages
    assert message == (
        "convert_batchnorm has left 0: a WithActivation does not only normalize; "
        "2: it takes a list of domains, and a BatchNorm2d a tensor; "
        "3: it has not been called yet (lazy)"
    )


def test_timms_layers(caplog):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = fill(timm.create_model("mobilenetv3_small_050")).eval()
    before = copy.deepcopy(model)
    convert_batchnorm(model, BatchNorm2d)
    assert not caplog.messages
    assert {type(m) for m in model.modules() if is_batch_norm(m)} == {
        BatchNorm2d,
        mixed(AndMore, BatchNorm2d),
    }
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    frozen = freeze(copy.deepcopy(before)).train()
    for module in frozen.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    frozen.drop_rate = 0.0
    torch.testing.assert_close(frozen(x), before(x), rtol=1e-4, atol=1e-4)


def test_parts_of_a_model():
    model = nn.ModuleDict({"a": nn.BatchNorm2d(C), "b": nn.BatchNorm2d(C)})
    convert_batchnorm(model, BatchNorm2d, "b")
    assert [type(m) for m in model.values()] == [nn.BatchNorm2d, BatchNorm2d]


def test_a_layer_without_place_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(4))
    for make, words in [
        (partial(nn.GroupNorm, 2), "GroupNorm cannot hold the running_mean"),
        (lambda c: BatchNorm2d(c) if c == 2 else nn.GroupNorm(2, c), "GroupNorm cannot hold"),
        (lambda c: None, "NoneType, which it has made, is not accepted"),
        (bn_det.FrozenBatchNorm, "FrozenBatchNorm is not accepted; use bn_det.freeze"),
        (lambda c: BatchNorm2d(2 * c), "of 4 channels is not accepted for one of 2"),
        (BatchNorm2d(2), "make: a BatchNorm2d is not accepted; use a function"),
        (lambda c, layers={}: layers.setdefault(0, nn.Identity()), "one Identity for several"),
        ("SyncBN", "make: a str is not accepted; use a function"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert_batchnorm(model, make)
        assert [type(m) for m in model] == [nn.BatchNorm2d] * 2


@pytest.mark.parametrize("make", [lambda _: nn.LocalResponseNorm(3), nn.InstanceNorm2d])
def test_what_has_no_place_for_what_was_learned(make, caplog):
    """It is named; a layer that has learned nothing loses nothing."""
    model = nn.Sequential(*(nn.BatchNorm2d(C) for _ in range(3)))
    nn.init.uniform_(model[1].weight)
    model[2](torch.randn(2, C, 3, 3))
    convert_batchnorm(model, make)
    assert {type(m) for m in model} == {type(make(C))}
    (message,) = caplog.messages
    assert message == f"{type(make(C)).__name__} has no place for what has been learned in 1, 2"


def test_gradients_of_what_is_no_parameter_any_more():
    """They are dropped, as an optimizer goes on by them; not where the conversion fails."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C, affine=False))
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones(C)
    with pytest.raises(ValueError, match="FrozenBatchNorm2d cannot hold the weight"):
        convert_batchnorm(model, FrozenBatchNorm2d)
    assert all(parameter.grad is not None for parameter in parameters)
    convert_batchnorm(model, BatchNorm2d)
    assert all(parameter.grad is not None for parameter in parameters)
    convert_batchnorm(model, FrozenBatchNorm2d, "0")
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("affine", ["shared", "per_domain"])
@pytest.mark.parametrize("old", [bn_det.RoILevelBatchNorm2d, bn_det.SourceBatchNorm2d])
@pytest.mark.parametrize("new", [nn.BatchNorm2d, BatchNorm2d])
def test_flags_of_a_layer_of_domains(old, new, affine):
    """It says of itself what it holds, and its domains' layers hold the rest."""
    model = nn.Sequential(old(4, 2, population="per_domain", affine=affine))
    convert_batchnorm(model, new)
    layer = model.train()[0]
    assert layer.track_running_stats and layer.affine
    model(torch.randn(4, 4, 3, 3) + 5)
    assert layer.num_batches_tracked == 1 and (layer.running_mean > 0.3).all()


@pytest.mark.parametrize("flags", [{"track_running_stats": False}, {"affine": False}])
@pytest.mark.parametrize("population", ["shared", "per_domain"])
@pytest.mark.parametrize("affine", ["shared", "per_domain"])
def test_domains_that_hold_nothing(flags, population, affine):
    """Of a layer without statistics, or without weight and bias: the same function."""
    model = nn.Sequential(nn.BatchNorm2d(4, **flags)).train()
    choices = {"statistics": "shared", "population": population, "affine": affine}
    ours = convert_batchnorm(
        copy.deepcopy(model), lambda c: bn_det.RoILevelBatchNorm2d(c, 2, **choices)
    ).train()
    x = torch.randn(4, 4, 3, 3)
    with bn_det.roi_levels([0, 0, 1, 1]):
        torch.testing.assert_close(ours(x), model(x))
    ours[0].reset_parameters()
