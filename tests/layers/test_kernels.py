"""The kernels over lists of pieces, ATen's and Triton's, against float64.

Triton's are run by its interpreter, on the CPU, in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import EPS, SHAPES, by_autograd, make_case, statistics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bn_det import DomainBatchNorm2d, forward_levels
from bn_det.layers import ema, kernels
from bn_det.layers.moments import Moments
from cases import CASES, check_as_in_float64, domain_layer
from reference import EIGHT_CHOICES

CASES_AND_DTYPES = [
    *((name, torch.float32) for name in SHAPES),
    *(("levels", dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="of Triton, under its interpreter")


@pytest.fixture(autouse=True)
def implementation():
    with kernels.implementation("triton" if INTERPRETED else "aten"):
        yield


def test_of_triton_under_its_interpreter():
    """This file anew, in a process where Triton's kernels take tensors of the CPU."""
    pytest.importorskip("triton", "3.6")  # whose interpreter takes tuples
    if INTERPRETED:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(params=CASES_AND_DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def name_and_dtype(request):
    return request.param


@pytest.fixture
def name(name_and_dtype):
    return name_and_dtype[0]


@pytest.fixture
def dtype(name_and_dtype):
    return name_and_dtype[1]


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def memory_format(request):
    return request.param


def assert_near(found, expected, dtype):
    # Pieces are rounded to their dtype once, before; outputs and sums once more.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 4e-2)
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def rounding(dtype):
    """Of what is computed per channel, in float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments_of(xs, sets):
    return Moments(*kernels.merge(*kernels.moments(xs, kernels.grid_of(xs)), sets))


def test_moments(name, dtype, memory_format):
    case = make_case(name, dtype, memory_format)
    # In any order, with a set that holds another, and one that is held twice.
    sets = [[k] for k in reversed(range(len(case.xs)))] + [list(range(len(case.xs)))]
    found = moments_of(case.xs, sets)
    assert found.mean.dtype == found.var.dtype == torch.promote_types(dtype, torch.float32)
    for k, of_set in enumerate(sets):
        count, mean, var = statistics([case.xs[n] for n in of_set])
        assert found.count[k] == count
        assert_near(found.mean[k], mean, rounding(dtype))
        assert_near(found.var[k], var, rounding(dtype))


def test_moments_of_a_large_mean(memory_format):
    case = make_case("tiles", torch.float32, memory_format, mean=1e4)
    found = moments_of(case.xs, [[0, 1]]).row(0)
    _, mean, var = statistics(case.xs)
    # The mean is rounded to 5e-4 in float32; the variance does not lose what it is less than that.
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-3, atol=0)


def test_moments_of_ranks(name, dtype):
    """What ranks have packed merges into what one process would find that holds everything."""
    case, other = (make_case(name, dtype, torch.contiguous_format) for _ in range(2))
    ranks = torch.stack(
        [kernels.pack(*kernels.moments(c.xs, kernels.grid_of(c.xs))) for c in (case, other)]
    )
    sets = [list(range(len(case.xs))), [0]]
    found = Moments(*kernels.merge_packed(ranks, sets, torch.promote_types(dtype, torch.float32)))
    for k, of_set in enumerate(sets):
        count, mean, var = statistics([c.xs[n] for c in (case, other) for n in of_set])
        assert found.count[k] == count
        assert_near(found.mean[k], mean, rounding(dtype))
        assert_near(found.var[k], var, rounding(dtype))


def test_what_is_not_finite_stays():
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0], x[1, 1, 2, 2] = float("nan"), float("inf")
    found = moments_of([x, torch.randn(1, 3, 4, 4)], [[0, 1]]).row(0)
    assert found.mean.isfinite().tolist() == found.var.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("affine, relu", [(True, False), (False, False), (True, True)])
def test_normalize_and_backward(name, dtype, memory_format, affine, relu):
    case = make_case(name, dtype, memory_format, affine)
    grid = kernels.grid_of(case.xs)
    assert (grid is not None) == INTERPRETED
    how = case.how(moments_of(case.xs, case.sets), relu)
    ys = kernels.normalize(case.xs, how, grid)
    of_batches, sums = kernels.backward_sums(case.dys, case.xs, how, grid)
    dxs = kernels.backward_inputs(case.dys, case.xs, how, of_batches, grid)

    expected_ys, expected_dxs, of_parameters = by_autograd(case, relu)
    for found, expected in ((ys, expected_ys), (dxs, expected_dxs)):
        for t, x, of_reference in zip(found, case.xs, expected, strict=True):
            assert t.shape == x.shape and t.dtype == x.dtype
            assert t.stride() == x.stride() or x.shape[2:].numel() == 1
            assert_near(t, of_reference.detach(), dtype)
    num = len(sums)
    for k, (dweight, dbias) in enumerate(
        zip(of_parameters[:num], of_parameters[num:], strict=True)
    ):
        scale = max(1.0, dweight.abs().max().item(), dbias.abs().max().item())
        assert_near(sums[k, 0] / scale, dbias / scale, rounding(dtype))
        assert_near(sums[k, 1] / scale, dweight / scale, rounding(dtype))


def test_parameters_and_statistics_with_strides():
    """Views of others' memory, as a row of a table or one value for all channels."""
    torch.manual_seed(0)
    xs = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 3, 1)]
    choices = dict.fromkeys(("statistics", "population", "affine"), "shared")
    layers = [DomainBatchNorm2d(6, 2, **choices) for _ in range(2)]
    plain, strided = layers
    nn.init.normal_(plain.weight)
    strided.weight = nn.Parameter(torch.stack([plain.weight.detach(), torch.ones(6)], 1)[:, 0])
    strided.bias = nn.Parameter(torch.zeros(1).expand(6))
    strided.running_mean, strided.running_var = torch.stack(
        [plain.running_mean, plain.running_var], 1
    ).unbind(1)
    found = []
    for layer in layers:
        leaves = [x.clone().requires_grad_() for x in xs]
        ys = layer(leaves)
        sum(y.pow(3).sum() for y in ys).backward()
        grads = [of.grad for of in (*leaves, layer.weight, layer.bias)]
        found.append([*ys, *grads, layer.running_mean, layer.running_var])
    for a, b in zip(*found, strict=True):
        assert_near(a, b.detach().double(), torch.float32)


def test_outputs_have_the_memory_format_of_inputs():
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    for size, *of in (
        ((2, 6, 5, 4), nchw, nhwc),
        ((2, 6, 5, 4), nhwc, nchw),
        ((0, 6, 5, 5), nhwc, nhwc),
        ((2, 6, 1, 1), nhwc, nhwc),
    ):
        xs = [torch.randn(*size), torch.randn(2, 6, 3, 3)]
        xs = [x.to(memory_format=f) for x, f in zip(xs, of, strict=True)]
        leaves = [x.detach().requires_grad_() for x in xs]
        ys = DomainBatchNorm2d(6, 2, statistics="shared")(leaves)
        grads = torch.autograd.grad(sum(y.pow(3).sum() for y in ys), leaves)
        for y, dx, f in zip(ys, grads, of, strict=True):
            assert y.is_contiguous(memory_format=f) and dx.is_contiguous(memory_format=f)


def test_no_levels():
    for layers in ([DomainBatchNorm2d(4, 3)], [DomainBatchNorm2d(4, 3), nn.ReLU()]):
        with pytest.raises(ValueError, match="takes one tensor for each of its 3 domains"):
            forward_levels(layers, [])


def test_gradients_in_another_memory_format():
    case = make_case("tiles", torch.float32, torch.channels_last)
    other = case._replace(dys=[dy.contiguous() for dy in case.dys])
    how, grid = case.how(moments_of(case.xs, case.sets)), kernels.grid_of(case.xs)
    found = []
    for c in (case, other):
        sums, _ = kernels.backward_sums(c.dys, c.xs, how, grid)
        found.append(kernels.backward_inputs(c.dys, c.xs, how, sums, grid))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@interpreted
def test_emas_move_as_those_of_a_loop():
    sizes = [60, 0, 5]
    batches = Moments(
        torch.tensor(sizes, dtype=torch.float64), torch.randn(3, 130), torch.rand(3, 130)
    )
    found, expected = (
        [nn.BatchNorm2d(130, momentum=m) for m in (0.1, None, 0.0, 0.3)] for _ in range(2)
    )
    for pair in zip(found, expected, strict=True):
        statistics = torch.randn(130), torch.rand(130)
        for layer in pair:
            layer.running_mean, layer.running_var = (t.clone() for t in statistics)
            layer.num_batches_tracked.fill_(3)
    # One after the other for the first; the last sees nothing.
    for name, layers in (("triton", found), ("aten", expected)):
        seen = [(layers[0], [0]), (layers[1], [0, 2]), (layers[0], [2]), (layers[2], [2])]
        with kernels.implementation(name):
            ema.update(batches, sizes, [*seen, (layers[3], [1])])
    for a, b in zip(found, expected, strict=True):
        assert a.num_batches_tracked == b.num_batches_tracked
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-6, atol=1e-6)


def test_an_empty_piece_keeps_its_affine_in_the_graph():
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = kernels.normalize_one(x, torch.zeros(3), torch.ones(3), weight, bias, EPS)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        "ghosts",
        "virtual batch",
        "levels shared-shared-shared",
        "levels shared-per_domain-per_domain",
        "levels per_domain-shared-shared",
        "levels, renorm",
        "levels shared, ReLU",
        "levels per_domain, ReLU",
        "sources of levels",
        "RoI levels, shared",
    ],
)
def test_layers(name):
    assert name in CASES
    check_as_in_float64(name, "cpu", torch.float32, torch.contiguous_format)


ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
VIEWS = {"unbind", "select", "slice", "detach", "view", "alias"}


class Operations(TorchDispatchMode):
    """The names of what is computed by ATen."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ALLOCATIONS | VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@interpreted
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
def test_launches(choices, relu, monkeypatch):
    """Four forward and three backward, and nothing of ATen, whatever levels have in common.

    A ReLU that follows adds none.
    """
    from bn_det.layers import triton_lists

    launched = []
    launch = triton_lists._launch

    def counting(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_lists, "_launch", counting)
    layer = domain_layer(choices)
    xs = [torch.randn(2, 5, n, n, requires_grad=True) for n in (3, 2, 2)]
    grads = [torch.randn_like(x) for x in xs]
    with Operations() as operations:
        ys = forward_levels([layer, *[nn.ReLU()] * relu], xs)
    # Where no level has been taken apart, there is nothing to merge without shared statistics.
    merged = choices[0] == "shared"
    assert launched == ["moments", *["merge"] * merged, "normalize", "update_emas"]
    assert operations.names == []
    launched.clear()
    with Operations() as operations:
        torch.autograd.grad(ys, [*xs, *layer.parameters()], grads)
    assert launched == ["sums", "add_up", "inputs"]
    assert operations.names == []


@interpreted
@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_])
def test_a_relu_is_exact(relu):
    """To the bit, with the gradients of a ReLU by itself."""
    layer = domain_layer(("shared", "shared", "shared"))
    xs = [torch.randn(2, 5, n, n, requires_grad=True) for n in (3, 2, 2)]
    with torch.no_grad():
        xs[1][:, 2] = xs[0][:, 2] = xs[2][:, 2] = 1.0  # ends at 0, which no gradient goes through
    grads = [torch.randn_like(x) for x in xs]
    inputs = [*xs, *layer.parameters()]
    found = forward_levels([layer, relu], xs)
    expected = [F.relu(y) for y in layer(xs)]
    assert not any(y[:, 2].any() for y in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grads),
        torch.autograd.grad(expected, inputs, grads),
        rtol=0,
        atol=0,
    )


@interpreted
@pytest.mark.parametrize("watched", [0, 1])
def test_a_relu_is_apart_where_somebody_looks(watched):
    layers = [domain_layer(("shared", "shared", "shared")), nn.ReLU()]
    seen = []
    handle = layers[watched].register_forward_hook(lambda module, args, y: seen.append(y))
    xs = [torch.randn(2, 5, n, n) for n in (3, 2, 2)]
    forward_levels(layers, xs)
    negative = [any((y < 0).any() for y in ys) for ys in seen]
    assert negative == ([True] if watched == 0 else [False] * 3)
    handle.remove()
    forward_levels(layers, xs)
    assert len(seen) == len(negative)


@pytest.mark.skipif(INTERPRETED, reason="it is Triton's process")
def test_without_triton(monkeypatch, caplog):
    """A GPU where Triton's kernels do not work gets ATen's, and one line."""
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    for module in ("triton_lists", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"bn_det.layers.{module}", raising=False)
        monkeypatch.delattr(f"bn_det.layers.{module}", raising=False)
    for cached in (kernels._triton, kernels._working):
        cached.cache_clear()
    try:
        for _ in range(2):
            assert kernels._working(torch.device("cuda", 0)) is None
    finally:
        kernels._working.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "cuda:0" in record.getMessage() and "triton" in record.getMessage()
