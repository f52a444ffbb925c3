import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import DomainBatchNorm2d
from bn_det.errors import InputError
from reference import EIGHT_CHOICES

SIZES = [(3, 5, 4), (3, 3, 2), (3, 2, 2), (2, 1, 1)]  # N, H, W of each domain
eight_choices = pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)


def make(choices, num_domains=4, channels=5, **kwargs):
    """A layer with a random state."""
    statistics, population, affine = choices
    layer = DomainBatchNorm2d(
        channels,
        num_domains,
        statistics=statistics,
        population=population,
        affine=affine,
        **kwargs,
    ).double()
    for t in (*layer.parameters(), *layer.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
    return layer


def pyramid(sizes=SIZES, channels=5, dtype=torch.float64):
    return [
        (torch.randn(n, channels, h, w) * (k + 1) + k).to(dtype).requires_grad_()
        for k, (n, h, w) in enumerate(sizes)
    ]


def affines(layer):
    holders = [layer.affine_of(k) for k in range(layer.num_domains)]
    return [h.weight for h in holders], [h.bias for h in holders]


def gradients(ys, inputs):
    """Of a random linear function of the outputs, the same for the same shapes."""
    torch.manual_seed(1)
    loss = sum((y.double() * torch.randn(y.shape, dtype=torch.float64)).sum() for y in ys)
    return torch.autograd.grad(loss, inputs)


def assert_all_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@eight_choices
def test_training_equals_the_definition(choices):
    layer, xs = make(choices), pyramid()
    ys = layer(xs)
    expected = reference.domain_batch_norm(xs, *affines(layer), choices[0])
    assert_all_close(ys, expected, 1e-10)  # float64 rounding
    inputs = [*xs, *layer.parameters()]
    assert_all_close(gradients(ys, inputs), gradients(expected, inputs), 1e-10)


@eight_choices
@pytest.mark.parametrize("momentum", [0.1, None])
def test_population_statistics(choices, momentum):
    """The EMA rules of the three choices, for two batches."""
    statistics, population, _ = choices
    layer = make(choices, momentum=momentum)
    holders = list(dict.fromkeys(layer.population_of(k) for k in range(len(SIZES))))
    expected = [[h.running_mean.clone(), h.running_var.clone(), 0] for h in holders]
    for _ in range(2):
        xs = [x.detach() for x in pyramid()]
        layer(xs)
        if population == "per_domain":
            updates = [(k, [x]) for k, x in enumerate(xs)]
        elif statistics == "shared":
            updates = [(0, xs)]
        else:
            updates = [(0, [x]) for x in xs]
        for k, batch in updates:
            expected[k][2] += 1
            m = 1 / expected[k][2] if momentum is None else momentum
            for i, value in enumerate(reference.unbiased(batch)):
                expected[k][i] = (1 - m) * expected[k][i] + m * value
    for holder, (mean, var, count) in zip(holders, expected, strict=True):
        assert holder.num_batches_tracked == count
        torch.testing.assert_close(holder.running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(holder.running_var, var, rtol=1e-10, atol=1e-10)


@eight_choices
def test_evaluation_equals_the_definition(choices):
    layer, xs = make(choices).eval(), pyramid()
    before = copy.deepcopy(layer.state_dict())
    ys = layer(xs)
    expected = [
        reference.normalize(x, p.running_mean, p.running_var, a.weight, a.bias)
        for x, p, a in ((x, layer.population_of(k), layer.affine_of(k)) for k, x in enumerate(xs))
    ]
    inputs = [*xs, *layer.parameters()]
    assert_all_close(ys, expected, 1e-10)
    assert_all_close(gradients(ys, inputs), gradients(expected, inputs), 1e-10)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def torchs_own(layer, xs):
    """The layer's forward pass by ``F.batch_norm`` alone, population statistics updated with it."""
    pops = [layer.population_of(k) for k in range(len(xs))]
    eps = layer.eps
    if not layer.training:
        ys = [
            F.batch_norm(x, p.running_mean, p.running_var, eps=eps)
            for x, p in zip(xs, pops, strict=True)
        ]
    else:
        ys = []
        for x, p in zip(xs, pops, strict=True):
            own = layer.population == "per_domain" or layer.statistics == "per_domain"
            ema = (p.running_mean, p.running_var) if own else (None, None)
            ys.append(F.batch_norm(x, *ema, training=True, momentum=0.1, eps=eps))
        if layer.statistics == "shared":
            joined = torch.cat([x.flatten(2) for x in xs], 2)
            ema = (None, None) if own else (layer.running_mean, layer.running_var)
            joined = F.batch_norm(joined, *ema, training=True, momentum=0.1, eps=eps)
            parts = joined.split([x.shape[2] * x.shape[3] for x in xs], 2)
            ys = [y.reshape(x.shape) for x, y in zip(xs, parts, strict=True)]
    shape = (1, -1, 1, 1)
    return [y * w.view(shape) + b.view(shape) for y, w, b in zip(ys, *affines(layer), strict=True)]


@eight_choices
@pytest.mark.parametrize("training", [True, False])
def test_equals_torchs_own(choices, training):
    layer = make(choices).train(training)
    other = copy.deepcopy(layer)
    for _ in range(2):
        xs = pyramid([(2, 5, 4), (2, 3, 2), (2, 2, 2), (2, 1, 1)])
        ys, expected = layer(xs), torchs_own(other, xs)
        assert_all_close(ys, expected, 1e-10)
        found = gradients(ys, [*xs, *layer.parameters()])
        assert_all_close(found, gradients(expected, [*xs, *other.parameters()]), 1e-10)
    for (name, a), b in zip(layer.state_dict().items(), other.state_dict().values(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_module_called_for_each_level_to_the_bit():
    """Row 3 of Table 5: per-domain statistics, shared population, against nn.BatchNorm2d."""
    layer = DomainBatchNorm2d(5, len(SIZES), population="shared")
    torchs = nn.BatchNorm2d(5)
    for _ in range(3):
        xs = pyramid(dtype=torch.float32)
        for ours, theirs in zip(layer(xs), [torchs(x) for x in xs], strict=True):
            assert torch.equal(ours, theirs)
    for name, value in torchs.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_separate_modules_to_the_bit():
    """Row 4: everything but the affine per domain."""
    layer = DomainBatchNorm2d(5, len(SIZES))
    torchs = [nn.BatchNorm2d(5, affine=False) for _ in SIZES]
    for _ in range(3):
        xs = pyramid(dtype=torch.float32)
        ys = layer(xs)
        for bn, x, y in zip(torchs, xs, ys, strict=True):
            assert torch.equal(bn(x), y)
    for k, bn in enumerate(torchs):
        for name, value in bn.state_dict().items():
            assert torch.equal(layer.state_dict()[f"{k}.{name}"], value), name


def test_concatenation():
    """Row 1: one nn.BatchNorm2d on the concatenated levels, gradients and EMA included."""
    layer, torchs = DomainBatchNorm2d(5, 3, statistics="shared", population="shared"), None
    torchs = nn.BatchNorm2d(5)
    xs = pyramid(SIZES[:3], dtype=torch.float32)
    areas = [x.shape[2] * x.shape[3] for x in xs]
    joint = torchs(torch.cat([x.flatten(2) for x in xs], 2).unsqueeze(3))
    expected = [y.view(x.shape) for x, y in zip(xs, joint.split(areas, 2), strict=True)]
    ys = layer(xs)
    # float32, a few hundred values.
    assert_all_close(ys, expected, 1e-5)
    found = gradients(ys, [*xs, layer.weight, layer.bias])
    assert_all_close(found, gradients(expected, [*xs, torchs.weight, torchs.bias]), 1e-4)
    torch.testing.assert_close(layer.state_dict(), torchs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("affine", ["shared", "per_domain"])
def test_gradcheck(affine):
    layer = make(("shared", "shared", affine), num_domains=2, channels=2)
    xs = pyramid([(2, 2, 2), (1, 1, 2)], channels=2)
    parameters = list(layer.parameters())

    def f(*inputs):
        xs, values = inputs[:2], inputs[2:]
        names = dict(zip((n for n, _ in layer.named_parameters()), values, strict=True))
        return tuple(torch.func.functional_call(layer, names, (list(xs),)))

    assert torch.autograd.gradcheck(f, (*xs, *parameters))


@eight_choices
def test_jacobian(choices):
    """dy_i / dx_j is nonzero exactly where i and j are in one declared normalization batch."""
    layer = make(choices, num_domains=2, channels=2)
    xs = pyramid([(2, 2, 2), (3, 1, 2)], channels=2)
    domain = torch.tensor([0, 0, 1, 1, 1])
    same_domain = domain[:, None] == domain
    expected = torch.ones(5, 5, dtype=torch.bool) if choices[0] == "shared" else same_domain
    assert torch.equal(reference.dependence(layer, xs), expected)
    layer.eval()
    assert torch.equal(reference.dependence(layer, xs), torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize("statistics", ["shared", "per_domain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(statistics, dtype):
    layer = make((statistics, "per_domain", "shared")).float()
    exact = copy.deepcopy(layer).double()
    xs = [x.detach().requires_grad_() for x in pyramid(dtype=dtype)]
    ys = layer(xs)
    assert all(y.dtype == dtype for y in ys)
    wide = [x.detach().double().requires_grad_() for x in xs]
    expected = exact(wide)
    # Two roundings to the half type, of values up to about 10.
    tolerance = 8 * torch.finfo(dtype).eps
    assert_all_close(ys, expected, tolerance)
    found = gradients(ys, [*xs, layer.weight, layer.bias])
    wanted = gradients(expected, [*wide, exact.weight, exact.bias])
    assert_all_close(found[:-2], wanted[:-2], 2 * tolerance)
    # Sums over a hundred values: relative to their size, about 10.
    for a, b in zip(found[-2:], wanted[-2:], strict=True):
        assert (a - b).abs().max() <= 4 * tolerance * b.abs().max()
    assert_all_close(layer.buffers(), exact.buffers(), 1e-4)  # statistics are float32


@pytest.mark.parametrize("statistics", ["shared", "per_domain"])
def test_half_precision_layer(statistics):
    """model.half(): parameters and buffers are of the half type, too."""
    layer = make((statistics, "shared", "shared")).bfloat16()
    exact = copy.deepcopy(layer).double()
    xs = [x.detach() for x in pyramid(dtype=torch.bfloat16)]
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    assert_all_close(layer(xs), exact([x.double() for x in xs]), tolerance)
    assert_all_close(layer.buffers(), exact.buffers(), tolerance)


@pytest.mark.parametrize("statistics", ["shared", "per_domain"])
def test_autocast(statistics):
    conv = nn.Conv2d(5, 5, 1)
    layer = make((statistics, "shared", "shared")).float()
    xs = pyramid(dtype=torch.float32)
    other = copy.deepcopy(layer)
    exact = other([conv(x) for x in xs])
    with torch.autocast("cpu", torch.bfloat16):
        ys = layer([conv(x) for x in xs])
    assert all(y.dtype == torch.bfloat16 for y in ys)
    found = gradients(ys, [*xs, *conv.parameters(), *layer.parameters()])
    assert_all_close(ys, exact, 0.1)  # bfloat16 has eight bits
    wanted = gradients(exact, [*xs, *conv.parameters(), *other.parameters()])
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == torch.float32
        if k != len(xs) + 1:  # the bias before a normalization has no gradient but rounding
            assert (a - b).norm() <= 0.1 * b.norm(), k


@pytest.mark.parametrize("statistics", ["shared", "per_domain"])
def test_channels_last(statistics):
    layer = make((statistics, "per_domain", "shared"))
    other = copy.deepcopy(layer)
    xs = pyramid([*SIZES[:3], (2, 1, 3)])
    last = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in xs]
    ys, expected = other(last), layer(xs)
    for y, x in zip(ys, last, strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last) and y.stride() == x.stride()
    assert_all_close(ys, expected, 1e-10)
    assert_all_close(gradients(ys, last), gradients(expected, xs), 1e-10)
    assert_all_close(other.buffers(), layer.buffers(), 1e-10)


def test_gradient_of_any_layout():
    """The sum's gradient is expanded from one value, a transposed output's is strided."""
    layer, xs = make(("shared", "shared", "shared")), pyramid()
    expected = reference.domain_batch_norm(xs, *affines(layer), "shared")
    for reduce in (lambda ys: sum(y.sum() for y in ys), lambda ys: ys[0].mT.square().sum()):
        ys = layer(xs)
        found = torch.autograd.grad(reduce(ys), [*xs, layer.weight])
        wanted = torch.autograd.grad(reduce(expected), [*xs, layer.weight], retain_graph=True)
        assert_all_close(found, wanted, 1e-10)


@eight_choices
@pytest.mark.parametrize("training", [True, False])
def test_empty_domains(choices, training):
    layer = make(choices).train(training)
    xs = pyramid([(3, 5, 4), (0, 3, 2), (3, 2, 0), (2, 1, 1)])
    before = copy.deepcopy(layer.state_dict())
    full = make(choices, num_domains=2).train(training)
    kept = [0, 3]
    full.load_state_dict(
        {n.replace("3.", "1."): v for n, v in before.items() if not n.startswith(("1.", "2."))}
    )
    ys = layer(xs)
    assert [y.shape for y in ys] == [x.shape for x in xs]
    small = [xs[k] for k in kept]
    assert_all_close([ys[k] for k in kept], full(small), 1e-12)
    grads = gradients(ys, [*xs, *layer.parameters()])
    assert all(torch.isfinite(g).all() for g in grads)
    after = layer.state_dict()
    for name, value in full.state_dict().items():
        assert torch.equal(after[name.replace("1.", "3.")], value), name
    for name in after:
        if name.startswith(("1.", "2.")):
            assert torch.equal(after[name], before[name]), name


@eight_choices
def test_all_empty(choices):
    layer = make(choices)
    before = copy.deepcopy(layer.state_dict())
    xs = pyramid([(0, 5, 4)] * 4)
    grads = gradients(layer(xs), [*xs, *layer.parameters()])
    assert all((g == 0).all() for g in grads)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_input_that_needs_no_gradient():
    layer = make(("shared", "shared", "shared"))
    xs = pyramid()
    xs[1] = xs[1].detach()
    expected = reference.domain_batch_norm(xs, *affines(layer), "shared")
    inputs = [xs[0], xs[2], layer.weight]
    assert_all_close(gradients(layer(xs), inputs), gradients(expected, inputs), 1e-10)
    with torch.no_grad():
        assert_all_close(layer(xs), expected, 1e-10)


@pytest.mark.parametrize("use_reentrant", [True, False])
@eight_choices
def test_activation_checkpointing(choices, use_reentrant):
    plain = make(choices)
    checkpointed = copy.deepcopy(plain)
    xs = pyramid()
    inputs = [*xs, *plain.parameters()]
    expected = gradients(plain(xs), inputs)
    ys = checkpoint(lambda *xs: tuple(checkpointed(xs)), *xs, use_reentrant=use_reentrant)
    torch.manual_seed(1)
    sum((y * torch.randn(y.shape, dtype=torch.float64)).sum() for y in ys).backward()
    found = [x.grad for x in (*xs, *checkpointed.parameters())]
    assert_all_close(found, expected, 1e-12)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_second_derivatives_are_refused():
    layer, xs = make(("shared", "shared", "shared")), pyramid()
    (grad,) = torch.autograd.grad(layer(xs)[0].square().sum(), xs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .* not implemented"):
        grad.square().sum().backward()


def test_a_batch_of_a_single_value_names_the_domain():
    xs = [torch.randn(1, 5, 2, 2), torch.randn(1, 5, 1, 1)]
    with pytest.raises(ValueError, match=r"domain 1: .* single value per channel"):
        DomainBatchNorm2d(5, 2)(xs)
    shared = DomainBatchNorm2d(5, 2, statistics="shared", population="shared")
    shared(xs)
    with pytest.raises(ValueError, match=r"all domains together: .* single value"):
        shared([xs[0][:0], xs[1]])
    # Normalized together, but a variance of its own could not be estimated.
    own = DomainBatchNorm2d(5, 2, statistics="shared")
    with pytest.raises(ValueError, match=r"domain 1: .* single value"):
        own(xs)
    assert own.population_of(0).num_batches_tracked == 0


def test_bad_input():
    layer = DomainBatchNorm2d(5, 2)
    x = torch.randn(2, 5, 2, 2)
    with pytest.raises(TypeError, match=r"list of 2 tensors.*got Tensor"):
        layer(x)
    with pytest.raises(ValueError, match="2 domains, got a list of 3"):
        layer([x] * 3)
    with pytest.raises(ValueError, match=r"domain 1: shape \(N, 5, H, W\).*\(2, 4, 2, 2\)"):
        layer([x, x[:, :4]])
    for name in ("statistics", "population", "affine"):
        with pytest.raises(InputError, match=rf"{name}: 'own' .*'shared', 'per_domain'"):
            DomainBatchNorm2d(5, 2, **{name: "own"})
    with pytest.raises(ValueError, match="num_domains: 0"):
        DomainBatchNorm2d(5, 0)


@eight_choices
def test_keys(choices):
    """CycleBatchNormList's: what is per domain under the domain's number, the rest without."""
    _, population, affine = choices
    expected = set()
    for sharing, names in [
        (population, ("running_mean", "running_var", "num_batches_tracked")),
        (affine, ("weight", "bias")),
    ]:
        prefixes = [""] if sharing == "shared" else [f"{k}." for k in range(3)]
        expected |= {prefix + name for prefix in prefixes for name in names}
    layer = make(choices, num_domains=3)
    assert set(layer.state_dict()) == expected
    assert "statistics=" + choices[0] in repr(layer)


@pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
def test_dtype_and_device_reach_all_of_a_layer(choices):
    statistics, population, affine = choices
    layer = DomainBatchNorm2d(
        3, 2, statistics=statistics, population=population, affine=affine, dtype=torch.float64
    )
    floating = [t for t in layer.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert {y.dtype for y in layer([x, x])} == {torch.float64}
    on_meta = DomainBatchNorm2d(3, 2, population=population, affine=affine, device="meta")
    assert {t.device.type for t in on_meta.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_are_no_choice(tracked):
    with pytest.raises(InputError, match="track_running_stats: it is not accepted by a layer of"):
        DomainBatchNorm2d(4, 2, track_running_stats=tracked)
