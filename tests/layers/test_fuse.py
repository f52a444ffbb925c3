"""Freezing, and folding BatchNorm into convolutions."""

import copy
import logging
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet18, resnet50

import reference
from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    SourceBatchNorm2d,
    fuse,
    unfuse,
)
from bn_det.errors import InputError
from bn_det.layers import PerLevel, forward_levels
from kinds import ConvNormReLU, NormAndMore
from old_torch import not_on_torch_2_4

C = 6


def randomize(model):
    """Every parameter and statistic matters; activations keep their scale."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(t, 0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            nn.init.uniform_(t, -0.5, 0.5)
    return model.double().eval()


def assert_same_outputs(before, after, *inputs):
    """In float64 but for rounding, far below the 1e-5 that float32 may differ by."""
    with torch.no_grad():
        torch.testing.assert_close(after(*inputs), before(*inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, lambda c: nn.SyncBatchNorm(c)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_sequential(norm, bias, affine):
    model = nn.Sequential(
        nn.Conv2d(3, C, 3, stride=2, padding=1, groups=3, bias=bias), norm(C), nn.ReLU(),
        nn.ConvTranspose2d(C, 4, 2, bias=bias), norm(4),
    )  # fmt: skip
    if not affine:
        for layer in (model[1], model[4]):
            layer.weight = layer.bias = None
    before = copy.deepcopy(randomize(model))
    report = fuse(model)
    assert report.fused == ["1", "4"] and report.left == {}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert_same_outputs(before, model, torch.randn(2, 3, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_resnets(build):
    torch.manual_seed(0)
    before = randomize(build())
    model = copy.deepcopy(before)
    number = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    report = fuse(model)
    assert len(report.fused) == number and report.left == {}
    assert_same_outputs(before, model, torch.randn(2, 3, 64, 64, dtype=torch.float64))


def test_float32():
    torch.manual_seed(0)
    before = randomize(resnet18()).float()
    model = copy.deepcopy(before)
    fuse(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y, expected = model(x), before(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("choices", reference.EIGHT_CHOICES, ids="-".join)
def test_head_on_levels(choices):
    names = ("statistics", "population", "affine")
    norm = DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)))
    before = randomize(nn.Sequential(nn.Conv2d(4, C, 3, padding=1), norm, nn.ReLU()))
    model = copy.deepcopy(before)
    report = fuse(model)
    assert report.fused == ["1"] and isinstance(model[1], nn.Identity)
    assert isinstance(model[0], PerLevel) == (choices[1:] != ("shared", "shared"))
    xs = [torch.randn(2, 4, 5 - k, 4, dtype=torch.float64) for k in range(3)]
    assert_same_outputs(
        lambda xs: forward_levels([before], xs), lambda xs: forward_levels([model], xs), xs
    )


@pytest.mark.parametrize("choices", reference.EIGHT_CHOICES, ids="-".join)
def test_convolution_with_a_norm_on_levels(choices):
    """In its parent's place."""
    names = ("statistics", "population", "affine")
    norm = DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)))
    before = randomize(nn.ModuleDict({"conv": ConvNormReLU(C, norm)}))
    model = copy.deepcopy(before)
    assert fuse(model).fused == ["conv.norm"]
    assert isinstance(model.conv, PerLevel) == (choices[1:] != ("shared", "shared"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    xs = [torch.randn(2, 4, 5 - k, 4, dtype=torch.float64) for k in range(3)]
    assert_same_outputs(
        lambda xs: forward_levels([before.conv], xs),
        lambda xs: forward_levels([model.conv], xs),
        xs,
    )


class Block(nn.Module):
    """Pairs that are one, and pairs that only seem so."""

    def __init__(self):
        super().__init__()
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            setattr(self, name, nn.Conv2d(C, C, 1))
        for name in ("bn1", "bn2", "bn3", "bn4", "bn5"):
            setattr(self, name, nn.BatchNorm2d(C))

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        y = self.conv2(x)  # used twice
        x = self.bn2(y) + y
        x = self.bn3(F.relu(self.conv3(x)))  # not the output of the convolution
        x = self.bn4(self.conv4(x)) + self.conv4(x)  # called twice
        return self.bn5(self.conv5(x)) + self.bn5(x)  # called twice


def test_pairs_that_are_not_certain_are_left_alone():
    before = randomize(Block())
    model = copy.deepcopy(before)
    report = fuse(model)
    assert report.fused == ["bn1"]
    assert set(report.left) == {"bn2", "bn3", "bn4", "bn5"}
    assert all("not certain" in reason for reason in report.left.values())
    assert_same_outputs(before, model, torch.randn(2, C, 3, 4, dtype=torch.float64))


class InTurn(nn.Module):
    """Counts calls, as Detectron2's CycleBatchNormList does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn0, self.bn1 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.position = 0

    def forward(self, x):
        norm = self.bn1 if self.position else self.bn0
        self.position = 1 - self.position
        return norm(self.conv(x))


def test_what_depends_on_the_number_of_calls_is_left_alone():
    """And its count is not touched."""
    before = randomize(InTurn())
    model = copy.deepcopy(before)
    report = fuse(model)
    assert report.fused == [] and set(report.left) == {"bn0", "bn1"}
    x = torch.randn(2, C, 3, 4, dtype=torch.float64)
    assert_same_outputs(before, model, x)
    assert_same_outputs(before, model, x)


class DependsOnData(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_is_left_alone():
    report = fuse(randomize(nn.Sequential(DependsOnData())))
    assert report.fused == [] and len(report.left) == 5


def test_reasons():
    shared = nn.Conv2d(C, C, 1)
    hooked = nn.Conv2d(C, C, 1)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "source": nn.Sequential(nn.Conv2d(C, C, 1), SourceBatchNorm2d(C, 2)),
            "batch": nn.Sequential(nn.Conv2d(C, C, 1), BatchNorm2d(C, eval_statistics="batch")),
            "none": nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=False)),
            "places": nn.Sequential(shared, nn.BatchNorm2d(C)),
            "again": nn.Sequential(shared),
            "hook": nn.Sequential(hooked, nn.BatchNorm2d(C)),
            "groups": nn.Sequential(nn.ConvTranspose2d(C, C, 1, groups=2), nn.BatchNorm2d(C)),
            "alone": nn.Sequential(nn.BatchNorm2d(C)),
        }
    ).eval()
    words = {
        "source.1": "source of each image", "batch.1": "batch statistics",
        "none.1": "no population statistics", "places.1": "several places", "hook.1": "hooks",
        "groups.1": "has groups", "alone.0": "not certain",
    }  # fmt: skip
    report = fuse(model)
    assert report.fused == [] and report.left.keys() == words.keys()
    assert all(words[name] in reason for name, reason in report.left.items())
    with pytest.raises(InputError, match="training mode; call eval"):
        fuse(model.train())


class Frozen(nn.Module):
    """FrozenBatchNorm2d as Detectron2 and torchvision have it, or with one thing that is not so."""

    def __init__(self, other=""):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))
        self.other = other
        if other != "no eps":
            self.eps = 1e-3

    def forward(self, x):
        eps = 1e-3 if self.other == "no eps" else self.eps
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *state, eps=eps)
        return F.leaky_relu(x, 0.9) if self.other == "activation" else x


def test_buffers_alone():
    """A layer that is no BatchNorm by type."""
    before = randomize(nn.Sequential(nn.Conv2d(3, C, 3), Frozen(), nn.ReLU()))
    model = copy.deepcopy(before)
    report = fuse(model)
    assert report.fused == ["1"] and isinstance(model[1], nn.Identity)
    assert_same_outputs(before, model, torch.randn(2, 3, 5, 4, dtype=torch.float64))


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Plain(nn.BatchNorm2d):
    """As Detectron2's NaiveSyncBatchNorm in evaluation."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [WithActivation(C), Frozen("activation"), Frozen("no eps")],
    ids=["activation", "frozen-activation", "frozen-eps"],
)
def test_what_computes_anything_else_is_left_alone(layer, dtype):
    """Classes that have a BatchNorm's state, and more to do (timm's BatchNormAct2d)."""
    before = randomize(nn.Sequential(nn.Conv2d(3, C, 1), layer)).to(dtype)
    model = copy.deepcopy(before)
    report = fuse(model)
    assert report.fused == [] and "does not only normalize" in report.left["1"]
    x = torch.randn(2, 3, 5, 4, dtype=dtype)
    assert torch.equal(model(x), before(x))


class Standardized(nn.Conv2d):
    """Weight standardization, as in timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class WithNorm(nn.Conv2d):
    """As Detectron2's Conv2d, or with the norm before the convolution."""

    def __init__(self, before):
        super().__init__(C, C, 3)
        self.norm, self.before = nn.BatchNorm2d(C), before

    def forward(self, x):
        if self.norm is None:
            return F.relu(super().forward(x))
        if self.before:
            return super().forward(self.norm(x))
        return F.relu(self.norm(super().forward(x)))


@pytest.mark.parametrize(
    "model, is_fused",
    [
        (nn.Sequential(Standardized(C, C, 3), nn.BatchNorm2d(C)), False),
        (nn.Sequential(Standardized(C, C, 3), DomainBatchNorm2d(C, 2)), False),
        (nn.Sequential(weight_norm(nn.Conv2d(C, C, 3)), nn.BatchNorm2d(C)), False),
        (WithNorm(before=True), False),
        (WithNorm(before=False), True),
        (nn.Sequential(nn.Conv2d(C, C, (1, 3), dilation=(2, 3)), nn.BatchNorm2d(C)), True),
    ],
    ids=["std", "std-levels", "weight_norm", "norm-first", "norm-inside", "dilation"],
)
def test_what_convolutions_compute_is_looked_at(model, is_fused):
    before = randomize(model)
    model = copy.deepcopy(before)
    random_state = torch.get_rng_state()
    report = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(report.fused) == is_fused
    assert len(report.left) != is_fused
    for reason in report.left.values():
        assert "does not only convolve" in reason or "call bake_weight_norms first" in reason
    x = torch.randn(2, C, 9, 10, dtype=torch.float64)
    if isinstance(model, nn.Sequential) and isinstance(model[1], DomainBatchNorm2d):
        x = [x, x]
        assert_same_outputs(
            lambda xs: forward_levels([before], xs), lambda xs: forward_levels([model], xs), x
        )
    else:
        assert_same_outputs(before, model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer", [Plain, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, L1BatchNorm2d]
)
def test_subclasses_and_types(layer, dtype):
    assert fuse(nn.Sequential(nn.Conv2d(3, C, 1), layer(C)).to(dtype).eval()).fused == ["1"]


def test_timms_layers():
    """Their activation is in the BatchNorm."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    before = randomize(timm.create_model("regnetx_002"))
    model = copy.deepcopy(before)
    report = fuse(model)
    norms = {n: m for n, m in before.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(isinstance(m, timm.layers.BatchNormAct2d) for m in norms.values())
    with_activation = {n for n, m in norms.items() if not isinstance(m.act, nn.Identity)}
    assert report.left == {} and set(report.fused) == norms.keys() > with_activation != set()
    for name in with_activation:
        assert [type(m) for m in model.get_submodule(name)] == [nn.Identity, nn.ReLU]
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_same_outputs(before, model, x)
    state = copy.deepcopy(model.state_dict())
    assert_same_outputs(before, unfuse(model), x)
    assert model.state_dict().keys() == before.state_dict().keys()
    of_file = randomize(timm.create_model("regnetx_002"))
    assert_same_outputs(before, unfuse(of_file, state), x)


def test_what_follows_stays():
    """With its weights, in a fused model and in its file; one that calls them otherwise is left."""
    before = randomize(nn.Sequential(nn.Conv2d(3, C, 3), NormAndMore(C)))
    model, x = copy.deepcopy(before), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert fuse(model).fused == ["1"] and type(model[1]) is nn.Sequential
    assert_same_outputs(before, model, x)
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.bias", "1.act.weight"}
    again = unfuse(copy.deepcopy(before), state)
    assert_same_outputs(before, again, x)
    assert type(unfuse(model)[1]) is NormAndMore
    assert_same_outputs(before, model, x)
    twice = randomize(nn.Sequential(nn.Conv2d(3, C, 3), NormAndMore(C, ("act", "act"))))
    assert "does not only normalize" in fuse(twice).left["1"]
    without = randomize(nn.Sequential(nn.Conv2d(3, C, 3), NormAndMore(C, ("drop",))))
    model = copy.deepcopy(without)
    assert fuse(model).fused == ["1"] and type(model[1]) is nn.Identity
    assert_same_outputs(without, model, x)


def test_training_a_fused_model_warns_once(caplog):
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), Frozen())
    randomize(model)
    fuse(model)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        model(x)
        assert not caplog.records
        model.train()(x)
        model(x)
    (record,) = caplog.records
    assert "should not be fine-tuned" in record.message


@not_on_torch_2_4("exports no layer that asks for its variables")
def test_export():
    model = randomize(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU()))
    fuse(model)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


def chain():
    layers = [nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3)]
    return nn.Sequential(*layers, nn.BatchNorm2d(C))


class Used(nn.Module):
    """The first convolution's output, or its weight, is used again, where its parent does not."""

    def __init__(self, how):
        super().__init__()
        self.features, self.how = chain(), how
        self.other = nn.Conv2d(C, C, 1)
        if how == "tied":
            self.other.weight = self.features[0].weight

    def forward(self, x):
        y = self.features(x)
        if self.how == "taps":
            taps = []
            for layer in self.features:
                x = layer(x)
                taps.append(x)
            return {"last": x, "taps": (taps[0], taps[3])}
        if self.how == "calls":
            return y, self.features[0](x)
        if self.how == "reads":
            return y, F.conv2d(x, self.features[0].weight)
        return [self.other(y) if self.how == "tied" else y]


@pytest.mark.parametrize(
    "how, unseen",
    [("taps", ["1", "4"]), ("calls", ["1"]), ("reads", ["1"]), ("tied", []), ("once", [])],
)
def test_what_is_used_elsewhere_is_left(how, unseen):
    """Further up, where only a call shows it; a weight of two modules is seen without."""
    before, x = randomize(Used(how)), torch.randn(2, C, 5, 4, dtype=torch.float64)
    model = copy.deepcopy(before)
    report = fuse(model, lambda m: m(x))
    assert set(report.fused) | report.left.keys() == {"features.1", "features.4"}
    assert [n for n, why in report.left.items() if "used elsewhere" in why] == [
        f"features.{k}" for k in unseen
    ]
    assert (how == "tied") == ("another module's" in report.left.get("features.1", ""))
    torch.testing.assert_close(model(x), before(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_other_output(dtype):
    torch.manual_seed(0)
    model = randomize(resnet18()).to(dtype)
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert not fuse(model, lambda m: m(x)).left


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


def test_a_weight_that_the_parent_reads_is_seen_without_a_call():
    report = fuse(randomize(ReadsWeight()))
    assert report.fused == [] and "not certain" in report.left["bn"]


@pytest.mark.parametrize(
    "check, words",
    [
        (lambda m: None, "does not call the model that it is given"),
        (lambda m: str(m(torch.ones(1, C, 5, 5).double())), "outputs without a tensor"),
        (lambda m: m(torch.randn(1, C, 5, 5).double()), "other outputs for the same model"),
    ],
)
def test_a_check_that_checks_nothing(check, words):
    model = randomize(chain())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"fuse: check: .*{words}"):
        fuse(model, check)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def in_two_places():
    act = nn.ReLU()
    return nn.Sequential(nn.Conv2d(C, C, 1), act, nn.Conv2d(C, C, 1), act, nn.BatchNorm2d(C))


class Notes(nn.Module):
    """Leaves a trace: in a list, a dict, another object, or a buffer."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.bn, self.where = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), where
        self.list, self.dict, self.other = [], {}, SimpleNamespace()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        x = self.conv(x)
        if self.where == "list":
            self.list.append(x)
        elif self.where == "dict":
            self.dict["x"] = x
        elif self.where == "object":
            self.other.x = x
        else:
            self.count += 1
        return self.bn(x)


def replaced(which):
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    of = {"conv": model[0], "bn": model[1], "parent": model}[which]
    original = of.forward
    of.forward = lambda x: original(x) + 1
    return model


def tied_by_data():
    model = nn.ModuleList(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)) for _ in range(2))
    model[1][0].weight.data = model[0][0].weight.data
    return nn.Sequential(*model)


SEEN = {
    "an activation twice": in_two_places,
    **{f"a trace in a {where}": partial(Notes, where) for where in ("list", "dict", "object")},
    "a trace in a buffer": partial(Notes, "buffer"),
    **{f"forward of {of} replaced": partial(replaced, of) for of in ("conv", "bn", "parent")},
    "tied by data": tied_by_data,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_looks_like_a_pair(name):
    model = SEEN[name]()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim():
            tensor.uniform_(0.5, 1.5)
    model.eval()
    x = torch.randn(2, C, 3, 3)
    with torch.no_grad():
        expected = model(x)
        vars(model).get("list", []).clear()
        before = copy.deepcopy(model.state_dict())
        report = fuse(model)
        assert not report.fused and report.left
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not vars(model).get("list")
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_in_training_mode_is_left():
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).eval()
    model[1].train()
    assert fuse(model).left == {"1": "it is in training mode"}


def test_distributed_and_compiled_models():
    model = randomize(chain()).float()
    x = torch.randn(2, C, 5, 5)
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    assert not fuse(compiled, lambda m: m(x)).left
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}])
def test_padding_that_is_larger_than_the_kernel(kwargs):
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=4, **kwargs), nn.BatchNorm2d(C))
    assert fuse(model.eval()).fused == ["1"]


def test_outputs_of_more_digits_than_the_model_has():
    x = torch.randn(2, C, 5, 5)
    assert not fuse(randomize(chain()).float(), lambda m: m(x).double()).left


def test_a_model_that_cannot_be_copied():
    model = randomize(chain())
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="fuse: check: the model cannot be copied: "):
        fuse(model, lambda m: m(torch.ones(1, C, 5, 5).double()))


def test_a_model_that_is_a_convolution():
    model = randomize(ConvNormReLU(C, DomainBatchNorm2d(C, 3, affine="per_domain")))
    assert "the model itself" in fuse(model).left["norm"]
