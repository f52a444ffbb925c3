"""update_bn_stats on frozen models, in half precision, and what it says where it cannot."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    convert_batchnorm,
    freeze,
    fuse,
    update_bn_stats,
)
from bn_det.errors import InputError
from kinds import call, every_kind, inputs_of, make

pytestmark = pytest.mark.usefixtures("one_thread")
C = 4


def test_a_forward_of_one_instance():
    """It is run, and what follows sees what it returns."""

    def make_model():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))

    model, plain = make_model(), make_model()
    model[0].forward = lambda x: nn.BatchNorm2d.forward(model[0], x).relu()
    batches = [torch.randn(4, C, 5, 5) for _ in range(3)]
    update_bn_stats(model, batches, 3, initial=True)
    plain.insert(1, nn.ReLU())
    update_bn_stats(plain, batches, 3, initial=True)
    for mine, wanted in ((model[0], plain[0]), (model[2], plain[3])):
        torch.testing.assert_close(mine.running_mean, wanted.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.running_var, wanted.running_var, rtol=1e-5, atol=0)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def make_net(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, C, 1), norm(C), nn.ReLU(), nn.Conv2d(C, C, 1), norm(C))
    for layer in (net[1], net[4]):
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return net.double()


def make_batches(number=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 3, 5, 5, generator=generator, dtype=torch.float64) * (k + 1)).to(dtype)
        for k in range(number)
    ]


FROZEN = {
    "torch": lambda c: freeze(nn.BatchNorm2d(c)),
    "SyncBatchNorm": lambda c: freeze(nn.SyncBatchNorm(c)),
    "ours": lambda c: freeze(BatchNorm2d(c)),
    "torchvision": FrozenBatchNorm2d,
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_layers(kind, training):
    """They get what the same model gets whose layers are not frozen, and stay frozen."""
    net = make_net(FROZEN[kind]).train(training)
    usual = make_net(nn.BatchNorm2d)
    usual.load_state_dict(net.state_dict(), strict=False)
    kept = [type(m) for m in net], copy.deepcopy(net.state_dict())
    report = update_bn_stats(net, make_batches(), 4, frozen=True)
    update_bn_stats(usual, make_batches(), 4)
    assert [of.name for of in report.layers] == ["1", "4"]
    assert ([type(m) for m in net], net.training) == (kept[0], training)
    for name, value in net.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, usual.state_dict()[name], rtol=0, atol=1e-12)
        else:
            assert torch.equal(value, kept[1][name]), name


@every_kind
def test_frozen_layers_of_every_kind(kind):
    layer, usual = make(kind), make(kind)
    freeze(layer)
    update_bn_stats(layer, [inputs_of(kind)], 1, call=call, frozen=True)
    update_bn_stats(usual, [inputs_of(kind)], 1, call=call)
    torch.testing.assert_close(layer.state_dict(), usual.state_dict(), rtol=0, atol=1e-12)
    before = copy.deepcopy(layer.state_dict())
    call(layer.train(), inputs_of(kind))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_layer_that_does_more():
    net, usual = make_net(WithActivation), make_net(WithActivation)
    update_bn_stats(freeze(net), make_batches(), 4, frozen=True)
    update_bn_stats(usual, make_batches(), 4)
    torch.testing.assert_close(net.state_dict(), usual.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["torch", "ours", "ghost", "levels"])
def test_half_precision(kind, dtype, frozen, layout):
    """Statistics of what the layer has seen, exact but for the rounding of the buffer."""
    makers = {
        "torch": nn.BatchNorm2d,
        "ours": BatchNorm2d,
        "ghost": lambda c: BatchNorm2d(c, ghost_size=2),
        "levels": lambda c: DomainBatchNorm2d(c, 2, population="shared"),
    }
    layer = makers[kind](3).to(dtype)
    layer = freeze(layer) if frozen else layer
    batches = [x.to(memory_format=layout) for x in make_batches(dtype=dtype)]
    as_list = {"call": lambda m, x: m([x, x])} if kind == "levels" else {}
    update_bn_stats(layer, batches, 4, frozen=frozen, **as_list)
    values = torch.cat(batches).double()
    assert layer.running_var.dtype == dtype
    eps = torch.finfo(dtype).eps
    var = values.var((0, 2, 3), correction=0)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=eps, atol=0)
    mean = values.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_does_not_fit(frozen):
    layer = nn.BatchNorm2d(3).half()
    net = nn.Sequential(freeze(layer) if frozen else layer)
    before = copy.deepcopy(net.state_dict())
    words = r"update_bn_stats: 0: \S+ does not fit a buffer of torch.float16; make .* float32"
    batches = [x * 500 for x in make_batches()]
    with pytest.raises(InputError, match=words):
        update_bn_stats(net, batches, 4, frozen=frozen, call=lambda m, x: m(x.half()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
def test_a_call_that_changes_the_mode(norm):
    """In evaluation mode layers normalize by their population statistics, whoever wrote them."""
    net = make_net(norm)
    watched, seen = copy.deepcopy(net).eval(), []
    watched[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for x in make_batches():
        watched(x)
    update_bn_stats(net, make_batches(), 4, call=lambda m, x: m.eval()(x))
    values = torch.cat(seen)
    torch.testing.assert_close(net[4].running_var, values.var((0, 2, 3), correction=0))
    assert net.training


def test_a_call_that_reaches_nothing():
    net = make_net(nn.BatchNorm2d)
    words = "the model, as it is called, reaches none of its BatchNorm layers"
    with pytest.raises(InputError, match=words):
        update_bn_stats(net, make_batches(), 4, call=lambda m, x: m[0](x))


def test_what_is_said_where_there_is_nothing_to_update(caplog):
    mixed = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    freeze(mixed[:2])
    bare = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    for model, words in [
        (mixed, "2 of 3 layers frozen (frozen=True updates them); 1 of 3 layers in evaluation"),
        (nn.Sequential(FrozenBatchNorm2d(3)), "1 of 1 layers frozen"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "the model has no BatchNorm"),
        (bare, "1 of 1 layers without population statistics"),
    ]:
        caplog.clear()
        assert not update_bn_stats(model, make_batches(), 4).layers
        assert f"update_bn_stats has nothing to update: {words}" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_old_statistics_that_are_not_finite(value):
    """They are infinitely far off; such a layer is not fused; the parameter at fault is named."""
    net = make_net(nn.BatchNorm2d)
    net[1].running_var[2] = value
    net[4].running_mean[0] = value
    report = fuse(copy.deepcopy(net).eval())
    assert report.left == {
        "1": "its running_var is NaN or infinite",
        "4": "its running_mean is NaN or infinite",
    }
    first, second = update_bn_stats(net, make_batches(), 4).layers
    assert first.var_shift == second.mean_shift == math.inf and first.mean_shift < math.inf
    assert fuse(copy.deepcopy(net).eval()).fused == ["1", "4"]
    net[1].weight.data[1] = value
    words = "4: its input has NaN or infinity in batch 0; 1.weight of the model is not finite"
    with pytest.raises(InputError, match=words):
        update_bn_stats(net, make_batches(), 4)


def test_after_a_conversion():
    """What has become ours by convert_batchnorm, of one dimension too."""
    net = nn.Sequential(nn.BatchNorm1d(3)).double()
    convert_batchnorm(net, BatchNorm2d)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    update_bn_stats(net, [x], 1)
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2)))


def test_statistics_that_two_layers_share():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    net[1].running_var = net[0].running_var
    before = copy.deepcopy(net.state_dict())
    words = "update_bn_stats: '0' and '1' hold their statistics in the same tensor"
    with pytest.raises(InputError, match=words):
        update_bn_stats(net, make_batches(), 4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    twice = nn.Sequential(net[0], net[0])
    assert update_bn_stats(twice, make_batches(), 4).layers
    beside = torch.zeros(2, 3).double()  # in one storage, as of a file's tensors
    net[1].running_mean, net[1].running_var = beside[0], beside[1]
    assert len(update_bn_stats(net, make_batches(), 4).layers) == 2


def test_statistics_that_are_parametrized():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    parametrize.register_parametrization(net[1], "running_var", Doubled())
    before = net[1].running_mean.clone()
    report = update_bn_stats(net, make_batches(), 4)
    assert [of.name for of in report.layers] == ["0"]
    assert report.left == {"1": "with statistics that are parametrized"}
    assert torch.equal(net[1].running_mean, before)


@pytest.mark.parametrize("loader", [None, 5, "abc"])
def test_what_is_no_data_loader(loader):
    kind = type(loader).__name__
    with pytest.raises(InputError, match=f"^data_loader: what is given is of type {kind}; use a"):
        update_bn_stats(make_net(nn.BatchNorm2d), loader, 4)


@pytest.mark.parametrize("tolerance", ["x", None, True])
def test_what_is_no_tolerance(tolerance):
    with pytest.raises(InputError, match="^tolerance: .* is not accepted; use 0"):
        update_bn_stats(make_net(nn.BatchNorm2d), make_batches(), 4, tolerance=tolerance)


def test_a_model_without_values():
    message = "^update_bn_stats: on the meta device, where nothing has a value: weight and 4 more"
    with pytest.raises(InputError, match=message):
        update_bn_stats(nn.BatchNorm2d(3, device="meta"), make_batches(), 4)


class Keeps(nn.Sequential):
    """Its train() leaves its first BatchNorm in evaluation mode, as norm_eval does."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("training", [True, False])
def test_adabn(training):
    """As in a test but for BatchNorm, by the formula; then each module is in the mode it was in."""
    net = make_net(nn.BatchNorm2d)
    net.insert(2, nn.Dropout(0.5)).train(training)
    net[1].eval()
    modes = [module.training for module in net.modules()]
    frozen = freeze(copy.deepcopy(net[1]))
    kept = Keeps(*copy.deepcopy(net)).train()
    batches = make_batches()
    update_bn_stats(net, batches, 4, adabn=True)
    assert [module.training for module in net.modules()] == modes
    conv, dropout = net[0], net[2]
    assert isinstance(dropout, nn.Dropout)
    seen = torch.cat([conv(x) for x in batches])
    torch.testing.assert_close(net[1].running_mean, seen.mean((0, 2, 3)))
    inner = torch.cat([net[4](F.relu(_by_batch(conv(x), net[1]))) for x in batches])
    torch.testing.assert_close(net[5].running_mean, inner.mean((0, 2, 3)))
    # What is frozen, or kept in evaluation mode by the model itself, stays as it was.
    update_bn_stats(kept, batches, 4, adabn=True)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(kept[1], name), getattr(frozen, name))
    inner = torch.cat([kept[4](F.relu(kept[1].eval()(conv(x)))) for x in batches])
    torch.testing.assert_close(kept[5].running_mean, inner.mean((0, 2, 3)))


def _by_batch(x, layer):
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
