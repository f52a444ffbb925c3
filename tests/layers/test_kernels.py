"""The kernels over lists of pieces, against float64."""

import pytest
import torch

from bn_det.layers.kernels import backward_inputs, backward_sums, mean_var, normalize

SHAPES = [(2, 3, 5, 7), (0, 3, 4, 4), (4, 3, 1, 1), (1, 3, 2, 2)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-3


def pieces(dtype, memory_format, shapes=SHAPES):
    xs = [torch.randn(shape, dtype=torch.float64) * 2 + 3 for shape in shapes]
    return [x.to(dtype).to(memory_format=memory_format) for x in xs]


def statistics(dtype):
    """Of each piece; kernels take them in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    means = [torch.randn(3, dtype=dtype) for _ in SHAPES]
    return means, [torch.rand(3, dtype=dtype) + 0.5 for _ in SHAPES]


def affines(dtype):
    dtype = torch.promote_types(dtype, torch.float32)
    return [None, *(torch.randn(3, dtype=dtype) for _ in SHAPES[1:])]


def column(x):
    return x.double().view(1, -1, 1, 1)


def normalized(x, mean, var):
    return (x.double() - column(mean)) * (column(var) + EPS).rsqrt()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def memory_format(request):
    return request.param


def assert_near(found, expected, dtype):
    # Pieces are rounded to their dtype once, before; outputs and sums once more.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 4e-2)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_mean_var(dtype, memory_format):
    for x, (mean, var) in zip(xs := pieces(dtype, memory_format), mean_var(xs), strict=True):
        assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
        rows = x.double().transpose(0, 1).flatten(1)
        expected = (rows.mean(1), rows.var(1, correction=0)) if x.numel() else torch.zeros(2, 3)
        # Moments are in float32 at least, whatever the pieces are in.
        rounding = torch.float64 if dtype == torch.float64 else torch.float32
        for found, of_reference in zip((mean, var), expected, strict=True):
            assert_near(found, of_reference.double(), rounding)


def test_normalize(dtype, memory_format):
    xs, (means, variances) = pieces(dtype, memory_format), statistics(dtype)
    weights, biases = affines(dtype), affines(dtype)
    ys = normalize(xs, means, variances, weights, biases, EPS)
    for x, y, mean, var, weight, bias in zip(
        xs, ys, means, variances, weights, biases, strict=True
    ):
        assert y.shape == x.shape and y.dtype == x.dtype
        assert y.is_contiguous(memory_format=memory_format)
        expected = normalized(x, mean, var)
        expected = expected if weight is None else expected * column(weight) + column(bias)
        assert_near(y, expected, dtype)


def test_an_empty_piece_keeps_its_affine_in_the_graph():
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    (y,) = normalize([x], [torch.zeros(3)], [torch.ones(3)], [weight], [bias], EPS)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_backward(dtype, memory_format):
    """Sums and inputs are the parts of autograd's derivative of one batch of all pieces."""
    xs, dys = pieces(dtype, memory_format), pieces(dtype, memory_format)
    weights = affines(dtype)
    doubles = [x.double().requires_grad_() for x in xs]
    together = torch.cat([x.transpose(0, 1).flatten(1) for x in doubles], 1)
    mean, var = together.mean(1), together.var(1, correction=0)
    scales = [torch.ones(3).double() if w is None else w.double() for w in weights]
    ys = [
        (x - mean.view(1, -1, 1, 1)) * (var.view(1, -1, 1, 1) + EPS).rsqrt() * column(scale)
        for x, scale in zip(doubles, scales, strict=True)
    ]
    expected = torch.autograd.grad(ys, doubles, [dy.double() for dy in dys])

    stored = torch.promote_types(dtype, torch.float32)
    means, variances = [[s.detach().to(stored)] * len(xs) for s in (mean, var)]
    sums = backward_sums(dys, xs, means, variances, EPS)
    for x, dy, (sum_dy, sum_dy_z) in zip(xs, dys, sums, strict=True):
        z = normalized(x, mean, var).detach()
        assert_near(sum_dy, dy.double().sum((0, 2, 3)), dtype)
        assert_near(sum_dy_z, (dy.double() * z).sum((0, 2, 3)), dtype)
    of_batch = sum(torch.stack(s) * scale.to(stored) for s, scale in zip(sums, scales, strict=True))
    count = torch.tensor(float(together.shape[1]), dtype=torch.float64)
    num = len(xs)
    found = backward_inputs(
        dys, xs, means, variances, weights, [of_batch] * num, [count] * num, EPS
    )
    for dx, x, of_reference in zip(found, xs, expected, strict=True):
        assert dx.shape == x.shape and dx.dtype == x.dtype
        assert_near(dx, of_reference, dtype)
