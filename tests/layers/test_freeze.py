"""Freezing and thawing: what holds a freeze, whatever is done to the model afterwards."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    FrozenBatchNorm,
    L1BatchNorm2d,
    convert_batchnorm,
    freeze,
    states,
    thaw,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers.freeze import _hold, is_frozen
from kinds import call, every_kind, fill, inputs_of, make, outputs_and_gradients
from old_torch import without_bias
from ranks import run_ranks

C = 6


class Plain(nn.BatchNorm2d):
    """A project's own subclass, which only normalizes."""


class WithActivation(nn.BatchNorm2d):
    """One that does more, as timm's."""

    def forward(self, x):
        return super().forward(x).relu()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    layer = nn.BatchNorm2d(C)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "BatchNorm3d": lambda: nn.BatchNorm3d(C),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(C),
    "no affine": lambda: nn.BatchNorm2d(C, affine=False),
    "no bias": lambda: without_bias(C),
    "subclass": lambda: Plain(C),
    "activation": lambda: WithActivation(C),
    "parametrized": parametrized,
    "ours": lambda: BatchNorm2d(C),
    "ghost": lambda: BatchNorm2d(C, ghost_size=2),
    "renorm": lambda: BatchNorm2d(C, renorm=(3, 5)),
    "batch in evaluation": lambda: BatchNorm2d(C, eval_statistics="batch"),
    "L1": lambda: L1BatchNorm2d(C),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make_net(name):
    """The layer, and one after it that is not frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[name](), nn.Dropout(0.0)).double()
    return fill(net)


def input_of(name, seed=0):
    shape = (4, C, *{"BatchNorm1d": [5], "BatchNorm3d": [2, 3, 2]}.get(name, [3, 5]))
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def by_population(name):
    """What the layer computes by its population statistics, from torch's function."""
    layer, x = make_net(name)[0], input_of(name)
    y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-5)
    return y.relu() if name == "activation" else y


def pickled(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(net):
    """The same state in a model that has been frozen before it was loaded."""
    other = freeze(copy.deepcopy(net))
    for t in (*other.parameters(), *other.buffers()):
        t.data.zero_()
    other.load_state_dict(net.state_dict())
    return other


HOLDERS = {
    "train()": lambda net: net.eval().train(),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state dict": loaded,
    "freeze again": freeze,
    "convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "to torch's": lambda net: convert_batchnorm(net, nn.BatchNorm2d),
    "to ours": lambda net: convert_batchnorm(net, BatchNorm2d),
    "to SyncBatchNorm": lambda net: convert_batchnorm(net, nn.SyncBatchNorm),
    "to ghost batches": lambda net: convert_batchnorm(net, lambda c: BatchNorm2d(c, ghost_size=2)),
}


CASES = [
    (name, holder)
    for name in LAYERS
    for holder in HOLDERS
    # What torch refuses; and what it takes the activation from, frozen or not.
    if (name, holder) not in (("parametrized", "pickle"), ("activation", "convert_sync_batchnorm"))
]


@pytest.mark.parametrize("name, holder", CASES)
def test_a_freeze_holds(name, holder):
    """Outputs of the population statistics in training and evaluation, and nothing moves."""
    net = HOLDERS[holder](freeze(make_net(name)))
    before = copy.deepcopy(net.state_dict())
    for mode in (True, False):
        y = net.train(mode)(input_of(name))
        torch.testing.assert_close(y, by_population(name), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())
    assert is_frozen(net[0])
    report = update_bn_stats(net.train(), [input_of(name)], 1)
    assert report.layers == []


@every_layer
def test_thaw_undoes_a_freeze(name):
    """Training goes on as that of a model that has never been frozen."""
    net, other = make_net(name), make_net(name)
    layer, parameters, kind = net[0], list(net.parameters()), type(net[0]).__name__
    hook = layer.register_forward_hook(lambda *_: None)
    thaw(freeze(net))
    assert net[0] is layer and type(layer).__name__ == kind and hook.id in layer._forward_hooks
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    for n in (net, other):
        y = n.train()(input_of(name).requires_grad_())
        y.square().sum().backward()
        if parameters:
            torch.optim.SGD(n.parameters(), 0.1).step()
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not torch.equal(net[0].running_mean, make_net(name)[0].running_mean)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.1),
    ],
)
@every_layer
def test_in_the_midst_of_a_training(name, make_optimizer, set_to_none):
    """No momentum and no weight decay moves what is frozen; statistics alone can be frozen, too."""
    for affine in (True, False):
        net = nn.Sequential(make_net(name), nn.Linear(1, 1).double())
        optimizer = make_optimizer(net.parameters())

        def step(net=net, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)
            net.train()  # which some loops do in each step
            y = net[0](input_of(name)).mean() * torch.ones(1, dtype=torch.float64)
            (net[1](y).sum() * 5).square().backward()
            optimizer.step()

        step()
        freeze(net, affine=affine)
        before = copy.deepcopy(net[0].state_dict())
        step()
        step()
        for key, value in net[0].state_dict().items():
            moves = not affine and key.endswith(("weight", "bias", "original"))
            assert torch.equal(value, before[key]) != moves, key


def steps_of_a_held_model(rank, how):
    """What has moved, and the norm of the gradients beside that of a model frozen before."""
    del rank
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 2, 1))
        if first:
            freeze(model)
        wrapped = DistributedDataParallel(model)
        outer = {"ddp": wrapped, "compiled": torch.compile(wrapped, backend="eager"),
                 "inside": nn.Sequential(wrapped)}[how]  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        if not first:
            freeze(outer)
        before = model[1].weight.detach().clone()
        norms = []

        def closure(optimizer=optimizer, outer=outer, norms=norms, model=model):
            optimizer.zero_grad()
            loss = outer(torch.ones(2, 3, 4, 4)).square().mean()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert torch.equal(model[1].weight, before)
        assert {state.affine for state in states(outer).layers} == {"fixed"}
        found.append(norms)
    return found


@pytest.mark.parametrize("how", ["ddp", "compiled", "inside"])
def test_steps_with_a_closure_in_ddp(how):
    """Whose gradients come after the step has begun; and no norm counts what is frozen."""
    for before, after in run_ranks(steps_of_a_held_model, 2, how):
        torch.testing.assert_close(after, before)


class Masked(nn.BatchNorm2d):
    def forward(self, x, mask=None):
        return super().forward(x)


def replaced():
    layer = nn.BatchNorm2d(C)
    layer.forward = lambda x, layer=layer: nn.BatchNorm2d.forward(layer, x).relu()
    return layer


@pytest.mark.parametrize("make_layer", [lambda: WithActivation(C), lambda: Masked(C), replaced])
def test_what_stays_in_evaluation_is_thawed_into_its_mode(make_layer):
    x = torch.randn(4, C, 3, 3)
    for mode in (True, False):
        net = nn.Sequential(make_layer()).train(mode)
        freeze(net)
        net(x)
        assert not net[0].num_batches_tracked and not net[0].training
        thaw(net)
        assert net[0].training == mode
        thaw(freeze(net).train()).train(not mode)
        assert net[0].training != mode


def test_a_frozen_layer_is_called_as_before():
    groups = torch.tensor([0, 0, 1, 1])
    layer, x = freeze(BatchNorm2d(C)), torch.randn(4, C, 3, 3)
    assert torch.equal(layer(x, groups=groups), layer(x))
    masked = freeze(Masked(C))
    assert torch.equal(masked(x, mask=x), masked(x))


def copies_of_a_held_model(rank):
    """Of a model that has been frozen in DistributedDataParallel: what of a copy moves, or not."""
    del rank
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 2, 1))
    wrapped = DistributedDataParallel(model)
    freeze(wrapped, affine=True)
    moved = []
    for net in (wrapped, copy.deepcopy(model), pickled(model), thaw(copy.deepcopy(model))):
        layer = next(m for m in net.modules() if hasattr(m, "running_mean"))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        before = layer.weight.detach().clone()
        for _ in range(2):
            net(torch.randn(2, 3, 4, 4)).square().mean().backward()
            optimizer.step()
        moved.append(not torch.equal(layer.weight, before))
    return moved, [type(p) is nn.Parameter for p in thaw(wrapped).parameters()]


def test_copies_of_a_model_in_ddp():
    """Its frozen parameters need a gradient, which goes nowhere; those of a copy do not."""
    for moved, ordinary in run_ranks(copies_of_a_held_model, 2):
        assert moved == [False, False, False, True]
        assert all(ordinary)


def test_one_that_is_made_as_it_is():
    """Of the initial statistics, as a BatchNorm2d in evaluation mode, which it is when thawed."""
    net, x = nn.Sequential(FrozenBatchNorm(8)), torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(net(x), nn.BatchNorm2d(8).eval()(x))
    assert "was=BatchNorm2d" in repr(net)
    assert type(thaw(net)[0]) is nn.BatchNorm2d


def test_statistics_and_affine_apart():
    net = make_net("BatchNorm2d").train()
    freeze(net, statistics=False)
    assert type(net[0]) is nn.BatchNorm2d and not net[0].weight.requires_grad
    net(input_of("BatchNorm2d"))
    assert net[0].num_batches_tracked == 1
    freeze(net, affine=False)
    assert type(net[0]) is FrozenBatchNorm
    thaw(net, affine=False)
    assert type(net[0]) is nn.BatchNorm2d and not net[0].weight.requires_grad
    thaw(net, statistics=False)
    assert net[0].weight.requires_grad
    for function in (freeze, thaw):
        with pytest.raises(InputError, match="statistics False and affine False leave nothing"):
            function(net, statistics=False, affine=False)


def make_tree():
    def part():
        return nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm2d(C)))

    return nn.ModuleDict({"stem": nn.BatchNorm2d(C), "layer1": part(), "layer10": part()})


@pytest.mark.parametrize(
    "modules, expected",
    [
        ("stem", {"stem"}),
        (["stem", "layer1"], {"stem", "layer1.0", "layer1.1.0"}),
        ("layer1*", {"layer1.0", "layer1.1.0", "layer10.0", "layer10.1.0"}),
        ("layer*.1", {"layer1.1.0", "layer10.1.0"}),
        ("layer1.1.0", {"layer1.1.0"}),
        (None, {"stem", "layer1.0", "layer1.1.0", "layer10.0", "layer10.1.0"}),
    ],
)
def test_parts_of_a_model(modules, expected):
    model = freeze(make_tree(), modules)
    kinds = (nn.BatchNorm2d, FrozenBatchNorm)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    assert {name for name, m in layers.items() if is_frozen(m)} == expected
    learning = {name for name, m in layers.items() if m.weight.requires_grad}
    assert learning == layers.keys() - expected
    thaw(model, modules)
    assert not any(is_frozen(m) for m in layers.values())


def test_without_assignment():
    """The layer itself is frozen, and not a copy that nobody has."""
    model = make_tree()
    freeze(model.stem)
    freeze(nn.ModuleList([model.layer1[0]]))
    assert is_frozen(model.stem) and is_frozen(model.layer1[0])


def test_what_cannot_be_frozen():
    model = make_tree()
    model.layer1[0] = nn.BatchNorm2d(C, track_running_stats=False)
    model.layer10[0] = nn.LazyBatchNorm2d()
    for modules, words in [
        (None, "layer1.0 cannot be frozen: it has no population statistics"),
        ("layer10", r"layer10.0 cannot be frozen: it has not been called yet \(lazy\)"),
        ("layer2", "no BatchNorm in 'layer2', and no module of that name; nearest names: .'layer1"),
        (["stem", "head.*"], "freeze: there is no BatchNorm in 'head.*'"),
    ]:
        with pytest.raises(InputError, match=words):
            freeze(model, modules)
    assert not is_frozen(model.stem) and model.stem.weight.requires_grad, "nothing is changed"
    freeze(nn.Sequential(nn.BatchNorm2d(C, track_running_stats=False)), statistics=False)
    with pytest.raises(InputError, match="BatchNorm2d cannot be frozen"):
        freeze(nn.BatchNorm2d(C, track_running_stats=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, C, 8, 8), (0, C, 8, 8), (1, C, 1, 1)])
def test_a_frozen_layer(dtype, affine, shape):
    """Equal to torch's function in float64, within the input's precision; gradients, too."""
    layer = make_net("BatchNorm2d")[0]
    expected = copy.deepcopy(layer).eval().requires_grad_(not affine)
    freeze(layer.float(), affine=affine)
    x = (3 * torch.randn(shape) + 1).to(dtype).to(memory_format=torch.channels_last)
    own, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = layer(own), expected(theirs)
    assert y.dtype == dtype
    dy = torch.randn(shape).to(dtype)
    y.backward(dy)
    wanted.backward(dy.double())
    # One rounding of the output; the affine's gradient adds up in float32.
    precision = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), wanted, **precision)
    torch.testing.assert_close(own.grad.double(), theirs.grad, **precision)
    if not affine:
        torch.testing.assert_close(
            layer.weight.grad.double(), expected.weight.grad, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_with_and_without_gradients(dtype, tolerance):
    """As exact as torch's own; half a step of values up to 4 is 0.008 and 0.001."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(8).requires_grad_(False)
    layer.running_mean.uniform_(5, 20)
    layer.running_var.uniform_(0.5, 2)
    layer = layer.to(dtype).eval()
    x = (torch.randn(4, 8, 9, 9) + layer.running_mean.float().view(1, -1, 1, 1)).to(dtype)
    state = (t.double() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
    expected = F.batch_norm(x.double(), *state, eps=layer.eps)
    freeze(layer)
    for needs_grad in (False, True):
        y = layer(x.clone().requires_grad_(needs_grad))
        assert y.dtype == dtype and (y - expected).abs().max() <= tolerance


def test_torch_fx_and_a_trace():
    net = resnet18(num_classes=2).eval()
    x, frozen = torch.randn(1, 3, 64, 64), freeze(copy.deepcopy(net))
    expected = create_feature_extractor(net, {"layer2": "out"})(x)["out"]
    assert torch.equal(create_feature_extractor(frozen, {"layer2": "out"})(x)["out"], expected)
    assert torch.equal(torch.jit.trace(frozen, x)(x), net(x))  # which compares it without gradients


def held(layer, x):
    """Bytes that a call holds for its backward pass."""
    sizes = []

    def pack(t):
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(sizes)


@pytest.mark.parametrize(
    "make_layer",
    [lambda: nn.BatchNorm2d(C), lambda: DomainBatchNorm2d(C, 2), lambda: L1BatchNorm2d(C)],
)
def test_what_a_frozen_layer_holds(make_layer):
    """A scale per channel; torch's own layer in evaluation holds its input."""
    x = torch.randn(8, C, 32, 32, requires_grad=True)
    layer = freeze(make_layer())
    number = 2 if isinstance(layer, DomainBatchNorm2d) else 1
    assert held(layer, [x, x] if number == 2 else x) == number * C * 4
    for parameter in layer.parameters():  # as in a DistributedDataParallel that waits for them
        _hold(parameter.requires_grad_())
    assert held(layer, [x, x] if number == 2 else x) == number * C * 4
    assert held(nn.BatchNorm2d(C).eval(), x) > x.numel() * 4


def test_thaw_refuses():
    with pytest.raises(InputError, match="thaw: there is no BatchNorm in 'a'"):
        thaw(make_tree(), "a")


@every_kind
@pytest.mark.parametrize("affine", [True, False])
def test_freeze(kind, affine):
    """Outputs and gradients of test time in training; no statistic changes, even by PreciseBN."""
    layer, expected = make(kind), make(kind).eval()
    layer = freeze(layer, affine=affine).train()
    before = copy.deepcopy(layer.state_dict())
    assert all(p.requires_grad != affine for p in layer.parameters())
    expected.requires_grad_(not affine)
    found = outputs_and_gradients(layer, inputs_of(kind))
    wanted = outputs_and_gradients(expected, inputs_of(kind))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert update_bn_stats(layer, [inputs_of(kind)], 1, call=call).layers == []
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def make_norm(mean, var, weight, bias):
    layer = nn.BatchNorm2d(len(mean), eps=0.0).double()
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return nn.Sequential(layer)


def scale_and_shift(model):
    """Those of the function a x + b that a frozen layer is."""
    (layer,) = model
    scale = (layer.weight / layer.running_var.sqrt()).detach()
    return scale, layer.bias.detach() - layer.running_mean * scale


def test_folded_statistics_are_learnt_otherwise(caplog):
    """One function before a step of SGD, two after it; freeze warns of the one, and says where."""
    mean, var, weight, bias = torch.tensor(
        [[3, -1, 0], [4, 0.25, 1], [1.5, 0.5, 1], [0.25, 1, -1]], dtype=torch.float64
    )
    trained = make_norm(mean, var, weight, bias)
    a, b = scale_and_shift(trained)
    folded = make_norm(torch.zeros_like(mean), torch.ones_like(var), a, b)
    with caplog.at_level(logging.WARNING):
        trained = freeze(trained, affine=False)
        freeze(copy.deepcopy(folded))
        assert not caplog.records
        folded = freeze(folded, affine=False)
    (record,) = caplog.records
    assert "mean 0 and variance 1: 0." in record.message

    x = (mean + torch.randn(50, 3, dtype=torch.float64) * var.sqrt())[..., None, None]
    target = torch.randn_like(x)
    steps = []
    for model in (trained, folded):
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
        torch.testing.assert_close(scale_and_shift(model), (a, b), rtol=1e-15, atol=1e-15)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        new_a, new_b = scale_and_shift(model)
        steps.append((new_a - a, new_b - b))
    (of_a, of_b), (of_a_folded, of_b_folded) = steps
    # By the chain rule, with weight = a std and bias = b + mean a.
    expected_a = (of_a_folded - mean * of_b_folded) / var
    torch.testing.assert_close(of_a, expected_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_b, of_b_folded - mean * of_a, rtol=1e-12, atol=1e-12)
    # Where x is the mean it moves by bias' step alone, or with the mean's share of weight's, too.
    moved, moved_folded = ((of_a * mean + of_b) for of_a, of_b in steps)
    ratios = moved_folded / moved
    assert ratios[0] > 20 and ratios[1] > 1.9 and ratios[2] == 1, "28, 2.001, and nothing folded"


@pytest.mark.parametrize(
    "name, value, warns",
    [
        ("running_var", 1.0, True),
        ("running_var", 1 - 1e-5, True),  # Detectron2's with nothing to normalize
        ("running_var", 1 + 1e-3, False),
        ("running_mean", 1e-9, False),
    ],
)
@pytest.mark.parametrize("sharing", ["shared", "per_domain"])
def test_when_freezing_warns(name, value, warns, sharing, caplog):
    head = DomainBatchNorm2d(C, 3, population=sharing, affine=sharing)
    model = nn.ModuleDict({"head": head, "conv": nn.Conv2d(C, C, 1)})
    head.population_of(1).get_buffer(name)[2] = value
    freeze(copy.deepcopy(model).requires_grad_(False), affine=False)
    freeze(nn.BatchNorm2d(C, affine=False), affine=False)
    assert not caplog.records
    freeze(model, affine=False)
    assert ["variance 1: head." in message for message in caplog.messages] == [True] * warns


@pytest.mark.parametrize("modules", [[], "", nn.ReLU(), [nn.ReLU()]])
def test_modules_that_are_no_names(modules):
    with pytest.raises(InputError, match="freeze: modules: .* is not accepted; use names of mod"):
        freeze(nn.Sequential(nn.BatchNorm2d(2)), modules)
