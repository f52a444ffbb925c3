import pytest
import torch

from bn_det import Moments
from bn_det.layers.aten_kernels import _fused_mean_var, _two_pass_mean_var

SHAPES = [(4, 3), (5, 3, 7), (2, 3, 5, 4), (2, 3, 4, 3, 2), (1, 3, 1, 1)]


def reference(x):
    v = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    return v.mean(0), v.var(0, correction=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_equals_float64(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    moments = Moments.of(x)
    mean, var = reference(x)
    assert moments.count == x.numel() // 3
    # Float64 rounding over at most a few hundred values.
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.var, var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "sliced", "expanded"])
def test_large_mean_keeps_the_variance(memory):
    x = torch.randn(2, 64, 40, 50) + 1e4
    if memory == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif memory == "sliced":
        x = x[:, ::2, 1:, ::3]
    elif memory == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    mean, var = reference(x)
    moments = Moments.of(x)
    # float32 holds 1e4 to 1e-3, and the variance to far better than the 1e-3 that is promised.
    assert ((moments.var - var) / var).abs().max() < 1e-4
    assert (moments.mean - mean).abs().max() < 2e-3


def test_both_algorithms_agree():
    """The one for accelerators runs on the CPU too, where it is exact for NCHW."""
    x = torch.randn(2, 8, 9, 10) + 100
    for a, b in zip(
        _fused_mean_var(x, torch.float32), _two_pass_mean_var(x, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean_var", [_fused_mean_var, _two_pass_mean_var])
def test_half_input_has_float32_moments(dtype, mean_var):
    x = (torch.randn(3, 4, 8, 8) + 5).to(dtype)
    assert Moments.of(x).mean.dtype == torch.float32
    found_mean, found_var = mean_var(x, torch.float32)
    mean, var = reference(x)
    assert found_mean.dtype == found_var.dtype == torch.float32
    torch.testing.assert_close(found_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_var.double(), var, rtol=1e-4, atol=1e-5)


def test_constant_input_has_zero_variance():
    assert (Moments.of(torch.full((2, 3, 4, 4), 1e6)).var == 0).all()


def test_merge_is_the_moments_of_the_union():
    sizes = [(2, 3, 5, 4), (0, 3, 5, 4), (1, 3, 1, 1), (3, 3, 0, 4), (4, 3, 2, 7)]
    xs = [torch.randn(s, dtype=torch.float64) * (k + 1) + 10 * k for k, s in enumerate(sizes)]
    merged = Moments.merge([Moments.of(x) for x in xs])
    v = torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in xs])
    assert merged.count == len(v)
    torch.testing.assert_close(merged.mean, v.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.var, v.var(0, correction=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.unbiased_var(), v.var(0), rtol=1e-12, atol=1e-12)


def test_merge_of_many_with_a_large_mean():
    x = torch.randn(1000, 4, 3, 3) + 1e4
    merged = Moments.merge([Moments.of(part) for part in x.split(1)])
    _, var = reference(x)
    assert ((merged.var - var) / var).abs().max() < 1e-4


def test_empty_sets():
    empty = Moments.of(torch.empty(0, 3, 4, 4))
    assert empty.count == 0
    assert torch.isfinite(torch.stack(Moments.merge([empty, empty])[1:])).all()
    assert (empty.unbiased_var() == 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match="nothing to merge"):
        Moments.merge([])
    with pytest.raises(ValueError, match=r"\(N, C, \*\).*int64"):
        Moments.of(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(N, C, \*\)"):
        Moments.of(torch.zeros(3))
