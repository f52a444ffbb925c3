"""Folded statistics made real again, with the same function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from bn_det import BatchNorm2d, DomainBatchNorm2d, freeze, thaw, unfold, update_bn_stats
from bn_det.errors import InputError
from bn_det.layers.folded import is_folded
from bn_det.layers.kinds import batch_norms
from old_torch import without_bias
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model, seed=0):
    """Every statistic and parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("running_var", "weight")) and t.dim() == 1:
            t.data.uniform_(0.5, 2, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            t.data.normal_(generator=generator)
    return model.eval()


@torch.no_grad()
def folded(model):
    """The same function, with what normalizes in weight and bias."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if getattr(layer, "running_var", None) is not None:
            scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
            layer.bias.sub_(layer.running_mean * scale)
            layer.weight.copy_(scale * (1 + layer.eps) ** 0.5)
            layer.running_mean.zero_()
            layer.running_var.fill_(1)
            if hasattr(layer, "num_batches_tracked"):
                layer.num_batches_tracked.zero_()
    return model


def make_net(norm):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)]
    parts = [[conv, norm(conv.out_channels), nn.ReLU()] for conv in convs]
    return trained(nn.Sequential(*[m for part in parts for m in part])).double()


def make_batches(number=5):
    return [torch.randn(4, 3, 6, 6, dtype=torch.float64) * (1 + k) + k for k in range(number)]


NORMS = {
    "torch": nn.BatchNorm2d,
    "ours": BatchNorm2d,
    "frozen": lambda c: freeze(nn.BatchNorm2d(c)),
    "torchvision's frozen": FrozenBatchNorm2d,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_same_function_and_measured_statistics(norm, training):
    """Statistics are those of each layer's inputs in the model as it is in evaluation."""
    model = folded(make_net(NORMS[norm])).train(training)
    batches, seen = make_batches(), {}
    layers = {n: m for m, n in batch_norms(model).items() if is_folded(m)}
    assert set(layers) == {"1", "4", "7"}
    watched = copy.deepcopy(model).eval()
    for name in layers:
        inputs = seen.setdefault(name, [])
        watched.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0])
        )
    with torch.no_grad():
        expected = [watched(x) for x in batches]
    report = unfold(model, batches, len(batches))
    assert [of.name for of in report.layers] == ["1", "4", "7"]
    assert model.training == training
    for name, layer in layers.items():
        values = torch.cat(seen[name])
        torch.testing.assert_close(layer.running_mean, values.mean((0, 2, 3)))
        torch.testing.assert_close(layer.running_var, values.var((0, 2, 3), correction=0))
        assert not is_folded(layer)
    with torch.no_grad():
        for x, y in zip(batches, expected, strict=True):
            torch.testing.assert_close(model.eval()(x), y, rtol=1e-9, atol=1e-9)
    thaw(model).train()
    after = model(batches[0]).var((0, 2, 3))  # of order one: real statistics, real weights
    assert (after < 100).all()


def test_a_resnet_in_float32():
    model = folded(trained(resnet18()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    unfold(model, [torch.randn(2, 3, 64, 64) for _ in range(3)], 3)
    with torch.no_grad():
        scale = expected.abs().max()
        assert (model(x) - expected).abs().max() <= 1e-5 * scale
    assert not any(is_folded(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_parts_and_what_is_not_folded():
    model = folded(make_net(nn.BatchNorm2d))
    model[7] = make_net(nn.BatchNorm2d)[7]  # not folded
    before = copy.deepcopy(model.state_dict())
    unfold(model, make_batches(), 5, modules="1")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    with pytest.raises(InputError, match="unfold: no layer is folded"):
        unfold(model, make_batches(), 5, modules="7")
    with pytest.raises(InputError, match="unfold: no layer is folded"):
        unfold(resnet18(), make_batches(), 5)


def test_domains():
    """Each domain's statistics; an affine that is shared cannot hold them."""
    layer = folded(trained(DomainBatchNorm2d(4, 2, affine="per_domain")).double())
    batches = [[torch.randn(3, 4, k, k, dtype=torch.float64) + k for k in (4, 2)]] * 2
    expected = layer(batches[0])
    unfold(layer, batches, 2)
    torch.testing.assert_close(layer(batches[0]), expected, rtol=1e-9, atol=1e-9)
    means = layer.get_buffer("1.running_mean")
    torch.testing.assert_close(means, batches[0][1].mean((0, 2, 3)))
    shared = DomainBatchNorm2d(4, 2)
    nn.init.uniform_(shared.weight)
    with pytest.raises(InputError, match="unfold: head: .* an affine that domains share"):
        unfold(nn.ModuleDict({"head": shared}), batches, 2)


class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        self[1].bias = self[0].bias


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: nn.Sequential(without_bias(4)), "0: it has no weight or no bias"),
        (Tied, "0: its weight or bias is another layer's, too"),
        (
            lambda: nn.Sequential(
                register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus())
            ),
            "0: its weight or bias is parametrized",
        ),
    ],
    ids=["no bias", "tied", "parametrized"],
)
def test_an_affine_that_cannot_take_up_the_difference(make, words):
    model = make()
    nn.init.uniform_(next(model.parameters()), 0.5, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"unfold: {words}"):
        unfold(model, [torch.randn(3, 4, 2, 2)], 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_half_precision_cannot_hold():
    model = nn.Sequential(nn.BatchNorm2d(3)).half()
    nn.init.uniform_(model[0].weight, 0.001, 0.002)
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(8, 3, 6, 6) * 1000).half()]
    with pytest.raises(InputError, match="unfold: 0: .* does not fit a buffer of torch.float16"):
        unfold(model.eval(), batches, 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_buffers_that_two_layers_share():
    model = nn.Sequential(FrozenBatchNorm2d(4), FrozenBatchNorm2d(4))
    model[0].weight.uniform_(0.5, 2)
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    with pytest.raises(InputError, match="unfold: 0: its weight or bias is another layer's, too"):
        unfold(model, [torch.randn(3, 4, 2, 2)], 1)


def test_what_batches_normalize_is_not_folded():
    """Its statistics are no part of its function in evaluation."""
    layer = BatchNorm2d(4, eval_statistics="batch")
    nn.init.uniform_(layer.weight)
    assert not is_folded(layer)
    with pytest.raises(InputError, match="unfold: no layer is folded"):
        unfold(nn.Sequential(layer), [torch.randn(3, 4, 2, 2)], 1)
    assert is_folded(freeze(layer))


def test_a_failure_changes_nothing():
    model = folded(make_net(nn.BatchNorm2d))
    before = copy.deepcopy(model.state_dict())
    batches = make_batches()
    batches[3][0] = float("nan")
    with pytest.raises(InputError, match="1: its input has NaN or infinity in batch 3"):
        unfold(model, batches, 5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


OVER_PROCESSES = {
    "torch": nn.BatchNorm2d,
    "ours": lambda c: BatchNorm2d(c, group="world"),
    "SyncBN": nn.SyncBatchNorm,
}


def unfolded(rank, norm, training):
    model = folded(make_net(OVER_PROCESSES[norm])).train(training)
    torch.manual_seed(1)
    report = unfold(model, make_batches(5)[3 * rank : 3 * rank + 3], 3, allow_short=True)
    return model.state_dict(), report.num_batches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", OVER_PROCESSES)
def test_several_processes(norm, training):
    """Each rank's layers see its own images, of which there may be more on one than on another."""
    (first, number), (second, _) = run_ranks(unfolded, 2, norm, training)
    assert number == 5
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = folded(make_net(nn.BatchNorm2d))
    torch.manual_seed(1)
    unfold(model, make_batches(5), 5)
    torch.testing.assert_close(first, model.state_dict())


def one_rank_is_folded(rank):
    """Neither waits for the other."""
    model = make_net(nn.BatchNorm2d).train()
    model = folded(model) if rank == 0 else model
    with pytest.raises((InputError, RuntimeError)) as e:
        update_bn_stats(model.train(), make_batches(), 5)
    return str(e.value)


def test_one_rank_that_looks_folded_ends_all():
    first, second = run_ranks(one_rank_is_folded, 2)
    assert "has mean 0 and variance 1" in first
    assert second.startswith("update_bn_stats: rank 0 failed: InputError: update_bn_stats: 1 and 2")


def test_recomputing_refuses_what_is_folded():
    """As it would change the function; what was never updated can be recomputed on purpose."""
    model = folded(make_net(nn.BatchNorm2d)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="1 and 2 more has mean 0 .*unfold keeps .*initial=True"):
        update_bn_stats(model, make_batches(), 5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert len(update_bn_stats(model, make_batches(), 5, initial=True).layers) == 3
    new = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    nn.init.zeros_(new[1].weight)  # as the last of a residual branch begins
    assert update_bn_stats(new, make_batches(), 5).layers
