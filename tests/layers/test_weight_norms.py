"""Weight normalizations against their definitions, timm's layers, and torch's weight_norm."""

import copy
import math

import pytest
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bn_det import bake_weight_norms, fuse, normalize_weight
from bn_det.errors import InputError
from bn_det.layers import (
    WEIGHT_NORMS,
    convert_batchnorm,
    forward_levels,
    normalize_convolutions,
    normalize_pyramid,
    normalize_tower,
)
from bn_det.layers.batch_norm import BatchNorm2d
from bn_det.layers.weight_norms import GAMMA_RELU, ScaledWeightStandardization
from bn_det.training.agc import AdaptiveGradientClipping
from old_torch import not_on_torch_2_4

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""In float64: the same but for the order of sums."""

LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, 2),
    "linear": lambda: nn.Linear(7, 5),
}
every_kind = pytest.mark.parametrize("kind", WEIGHT_NORMS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def by_definition(weight, unit_dim, kind, gain=1.0, fan_in=None):
    """Unit by unit, in a loop."""
    units = []
    for w in weight.unbind(unit_dim):
        values = w.flatten()
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
        scale = gain / math.sqrt(fan_in) if kind == "ScaledWS" else 1
        units.append(scale * (w - mean) / (var + 1e-6) ** 0.5)
    return torch.stack(units, unit_dim)


@every_layer
@pytest.mark.parametrize("kind", ["WS", "ScaledWS"])
def test_definition(name, kind):
    layer = LAYERS[name]().double()
    raw = layer.weight
    before = raw.detach().clone()
    normalize_weight(layer, kind, 1.5)
    unit_dim = int(name == "transposed")
    # Of the 2 x 2 weights between two channels an output of the transposed one meets one.
    fan_in = {"conv": 36, "grouped": 18, "transposed": 4, "linear": 7}[name]
    expected = by_definition(before, unit_dim, kind, 1.5, fan_in)
    torch.testing.assert_close(layer.weight, expected, **EXACT)
    # The trained parameter is the same object, with the same value.
    assert layer.parametrizations.weight.original is raw and torch.equal(raw, before)


@pytest.mark.parametrize("kind", ["WS", "ScaledWS"])
def test_equals_timm(kind):
    """In float64, to 1e-12: outputs, and gradients by all parameters and the input."""
    timm = pytest.importorskip("timm.layers", reason="timm is not installed")
    if kind == "WS":
        theirs = timm.StdConv2d(4, 6, 3, bias=True, stride=2, padding=1, groups=2)
    else:
        theirs = timm.ScaledStdConv2d(4, 6, 3, stride=2, padding=1, groups=2, gamma=GAMMA_RELU)
        nn.init.uniform_(theirs.gain, 0.5, 2)
    theirs.double()
    ours = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    normalize_weight(ours, kind, GAMMA_RELU)
    ours.load_state_dict(theirs.state_dict())
    assert set(ours.state_dict()) == set(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1)).double()
        y = layer(x.requires_grad_())
        (y**3).sum().backward()
        grads = {n.split(".")[-1]: p.grad for n, p in layer.named_parameters()}
        grads["weight"] = grads.pop("original", grads.get("weight"))
        results.append((y, x.grad, grads))
    torch.testing.assert_close(*results, **EXACT)


@every_layer
def test_weight_norm_equals_torchs(name):
    ours = LAYERS[name]().double()
    theirs = copy.deepcopy(ours)
    before = ours.weight.detach().clone()
    normalize_weight(ours, "WN")
    parametrizations.weight_norm(theirs, dim=int(name == "transposed"))
    torch.testing.assert_close(ours.weight, before, **EXACT)
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(3)
            layer.parametrizations.weight.original1.add_(0.1)
        (layer.weight**3).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@every_kind
@every_layer
def test_gradcheck(name, kind):
    layer = LAYERS[name]().double()
    normalize_weight(layer, kind, 1.3)
    function = layer.parametrizations.weight
    inputs = [p.detach().clone().requires_grad_() for p in function.parameters()]
    names = [n for n, _ in function.named_parameters()]

    def weight(*values):
        return torch.func.functional_call(function, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(weight, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_standardized_in_float32(dtype):
    """Their squares would leave float16, and their sums lose all digits."""
    layer = nn.Conv2d(64, 4, 3)
    nn.init.normal_(layer.weight, mean=300.0, std=30.0)
    layer.to(dtype)
    expected = by_definition(layer.weight.double(), 0, "ScaledWS", 1, 576)
    normalize_weight(layer, "ScaledWS")
    assert layer.weight.dtype == dtype
    rtol = torch.finfo(dtype).eps  # one rounding
    torch.testing.assert_close(layer.weight.double(), expected, rtol=rtol, atol=1e-6)


def make_model(kind=""):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, 2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    if kind:
        for k in (0, 2, 4):
            normalize_weight(model[k], kind)
    return model


@every_kind
def test_checkpoints(kind, tmp_path):
    """Through fvcore's checkpointer, which compares keys and shapes before it loads."""
    stock, model, other = make_model(), make_model(kind), make_model(kind)
    names = {k for k in stock.state_dict() if k.endswith("weight")}
    extra = {"WS": None, "ScaledWS": "gain", "WN": "weight_g"}[kind]
    own = {k.replace("weight", extra) for k in names} if extra else set()
    assert set(model.state_dict()) == set(stock.state_dict()) | own

    for p in (*model.parameters(), *stock.parameters()):
        nn.init.normal_(p)
    Checkpointer(model, str(tmp_path)).save("ours")
    Checkpointer(stock, str(tmp_path)).save("stock")
    checkpointer, found = Checkpointer(other), []
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(tmp_path / "ours.pth"))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    checkpointer.load(str(tmp_path / "stock.pth"))
    for name in names:
        torch.testing.assert_close(other.state_dict()[name], stock.state_dict()[name])
    missing = own if kind == "ScaledWS" else set()
    assert [(set(a), b, c) for a, b, c in found] == [(set(), [], []), (missing, [], [])]
    if kind == "WN":  # whose norms a stock checkpoint has in its weights
        torch.testing.assert_close(other(x), stock(x), rtol=1e-5, atol=1e-5)
    # A weight that is lacking is named as in the file.
    incompatible = other.load_state_dict({}, strict=False)
    assert set(incompatible.missing_keys) == set(other.state_dict())


@every_kind
def test_copies_and_baking(kind):
    model = make_model(kind)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model[0].requires_grad_(False)
    baked = bake_weight_norms(copy.deepcopy(model))
    assert [type(m) for m in baked] == [type(m) for m in make_model()]
    torch.testing.assert_close(baked(x), expected, rtol=1e-6, atol=1e-6)
    assert [baked[k].weight.requires_grad for k in (0, 2, 4)] == [False, True, True]
    # The model that was copied goes on, and the baked one is an ordinary one.
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    baked.load_state_dict(make_model().state_dict())
    assert set(baked.state_dict()) == set(make_model().state_dict())


@every_kind
def test_fuse_leaves_what_it_cannot_fold(kind):
    """A normalized weight cannot be set; once it is baked, the BatchNorm can be folded."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    for p in (*model.parameters(), model[1].running_mean, model[1].running_var):
        nn.init.uniform_(p, 0.5, 2)
    normalize_weight(model[0], kind)
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    report = fuse(model)
    assert not report.fused and "bake_weight_norms" in report.left["1"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert fuse(bake_weight_norms(model)).fused == ["1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def check_export(model, x):
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(list(program.module()(x)), list(model(x)), rtol=1e-5, atol=1e-5)


# It looks parameters up by their names in the state dict, which are ours.
exports_renamed = not_on_torch_2_4("exports no layer whose state dict has names of its own")


@exports_renamed
@every_kind
def test_export(kind):
    check_export(make_model(kind).eval(), torch.randn(2, 3, 4, 4))


@every_kind
def test_export_of_baked_weights(kind):
    """By every torch."""
    check_export(bake_weight_norms(make_model(kind).eval()), torch.randn(2, 3, 4, 4))


@every_kind
def test_one_weight_for_all_levels(kind):
    """A head on several levels normalizes a weight once; the gradient is that of all levels."""
    layers = [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)]
    tower = nn.Sequential(*layers).double()
    normalize_tower([tower[0], tower[2]], kind)
    calls = []
    function = tower[2].parametrizations.weight
    function.register_forward_hook(lambda *_: calls.append(1))
    xs = [torch.randn(2, 3, k, k).double() for k in (5, 3, 1)]
    grads = []
    for run in (lambda: forward_levels([tower], xs), lambda: [tower(x) for x in xs]):
        calls.clear()
        tower.zero_grad()
        ys = run()
        sum((y**2).sum() for y in ys).backward()
        grads.append((len(calls), ys, [p.grad.clone() for p in tower.parameters()]))
    assert [n for n, *_ in grads] == [1, 3]
    torch.testing.assert_close(grads[0][1:], grads[1][1:], **EXACT)


class Levels(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return forward_levels([self.tower], [x, x.flip(0)])


def head_of_levels():
    tower = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    normalize_tower([tower[0], tower[2]], "ScaledWS")
    return Levels(tower), torch.randn(2, 3, 6, 6)


@pytest.mark.filterwarnings("ignore")  # of tracing
def test_a_head_that_is_compiled_or_traced():
    """Where torch cannot keep the weight between levels, it is normalized for each."""
    model, x = head_of_levels()
    expected = model(x)
    for other in (
        torch.jit.trace(model, x, check_trace=False),
        torch.compile(model, backend="eager"),
    ):
        torch.testing.assert_close(list(other(x)), expected, rtol=1e-5, atol=1e-5)


@exports_renamed
def test_a_head_that_is_exported():
    check_export(*head_of_levels())


def kinds_and_gammas(layers):
    """Kind and gamma of each layer; None where its weight is plain."""
    found = []
    for layer in layers:
        if not parametrize.is_parametrized(layer):
            found.append(None)
            continue
        function = layer.parametrizations.weight[0]
        scaled = isinstance(function, ScaledWeightStandardization)
        per_unit = layer.weight.numel() // layer.weight.shape[function.unit_dim] if scaled else 0
        found.append(function.scale * per_unit**0.5 if scaled else layer.weight_norm)
    return [round(f, 6) if isinstance(f, float) else f for f in found]


RELU = round(GAMMA_RELU, 6)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("", [None] * 4),
        ("WS", ["WS", "WS", None, None]),
        ("ScaledWS", [1.0, RELU, RELU, RELU]),
        ("WN", ["WN"] * 4),
    ],
)
def test_tower(kind, expected):
    layers = [
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(3, 3, 3),
        nn.ConvTranspose2d(3, 3, 2),
        nn.Linear(9, 4),
    ]
    normalize_tower(layers, kind)
    assert kinds_and_gammas(layers) == expected


@pytest.mark.parametrize("after_relu", [True, False])
@pytest.mark.parametrize("kind", ["", *WEIGHT_NORMS])
def test_pyramid(kind, after_relu):
    laterals, outputs = nn.ModuleList([nn.Conv2d(8, 4, 1)]), nn.ModuleList([nn.Conv2d(4, 4, 3)])
    top = nn.ModuleDict({"p6": nn.Conv2d(8, 4, 3), "p7": nn.Conv2d(4, 4, 3)})
    normalize_pyramid(laterals, outputs, top, kind, after_relu)
    first = RELU if after_relu else 1.0
    expected = {
        "": [None] * 4,
        "WS": ["WS", "WS", None, None],
        "ScaledWS": [first, 1.0, first, RELU],
        "WN": ["WN"] * 4,
    }
    assert kinds_and_gammas([*laterals, *outputs, top.p6, top.p7]) == expected[kind]


def test_only_convolutions_that_are_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    normalize_convolutions(model, "WS")
    assert kinds_and_gammas(model[:2]) == [None, "WS"]
    # The layers are the same objects, in classes derived from theirs.
    assert isinstance(model[1], nn.Conv2d)
    assert isinstance(convert_batchnorm(model, BatchNorm2d)[2], BatchNorm2d)


def tower_variances(make, num_layers=4, channels=128):
    torch.manual_seed(0)
    tower = []
    for _ in range(num_layers):
        conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular")
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        tower.append(conv)
    make(tower)
    x, found = torch.randn(2, channels, 24, 24), []
    with torch.no_grad():
        for conv in tower:
            y = conv(x)
            found.append(y.var().item())
            x = y.relu()
    return found


def test_signal_propagation_through_a_tower():
    """RetinaNet's, as initialized: its variance is kept within a factor of 2 over 4 layers."""
    scaled = tower_variances(lambda tower: normalize_tower(tower, "ScaledWS"))
    assert all(0.5 < v < 2 for v in scaled), scaled
    assert tower_variances(lambda tower: None)[-1] < 1e-3
    assert tower_variances(lambda tower: normalize_tower(tower, "WS"))[-1] > 1e6


def test_adaptive_gradient_clipping():
    """The units of a normalized weight, also of a transposed convolution, are its outputs'."""
    models = make_model(), make_model("ScaledWS")
    grads = []
    for model in models:
        torch.manual_seed(1)
        raw = [p for p in model.parameters() if p.dim() > 1 and p.numel() > 6]
        for p in raw:
            p.grad = torch.randn(p.shape)
        AdaptiveGradientClipping(model)()
        grads.append([p.grad for p in raw])
    torch.testing.assert_close(*grads)
    assert models[1][2].parametrizations.weight[0].gain.shape == (1, 6, 1, 1)


@pytest.mark.parametrize(
    "layer, kind, message",
    [
        (nn.Conv2d(3, 3, 1), "BN", "kind: 'BN' is not accepted; use one of .*'ScaledWS'"),
        (nn.ConvTranspose2d(4, 4, 2, groups=2), "WS", "is transposed and has groups"),
        (nn.Conv2d(4, 4, 1, groups=4), "ScaledWS", "a single weight for each output unit"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "WS", "is parametrized already"),
        (nn.BatchNorm2d(2), "WS", "layer: what is given is of type BatchNorm2d; use a layer of"),
    ],
)
def test_bad_arguments(layer, kind, message):
    with pytest.raises(InputError, match=message):
        normalize_weight(layer, kind)


class Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def test_baking_leaves_what_else_is_parametrized():
    conv = nn.Conv2d(3, 4, 1)
    normalize_weight(conv, "WS")
    parametrize.register_parametrization(conv, "bias", Doubled())
    other, x = copy.deepcopy(conv), torch.randn(2, 3, 4, 4)
    expected = conv(x)
    bake_weight_norms(conv)
    torch.testing.assert_close(conv(x), expected)
    assert isinstance(conv.weight, nn.Parameter) and parametrize.is_parametrized(conv, "bias")
    assert parametrize.is_parametrized(other, "weight")
    torch.testing.assert_close(other(x), expected)
