"""Numbers of other frameworks' BatchNorm, by what the layers compute."""

import pytest
import torch
import torch.nn.functional as F

from bn_det.errors import InputError
from bn_det.layers.frameworks import from_caffe, var_from_inverse_std, with_eps, with_statistics

C = 5


@pytest.fixture
def x():
    return torch.randn(8, C, 3, 4, dtype=torch.float64) * 2 + 1


def random(low=0.5):
    return torch.rand(C, dtype=torch.float64) + low


def test_caffe(x):
    """Its layer: sums with a decay of 0.999, and a count that decays with them."""
    fraction, mean, var, factor = 0.999, torch.zeros(C), torch.zeros(C), torch.zeros(1)
    assert all((v == 0).all() for v in from_caffe(mean, var, factor))
    means, variances, weights = [], [], []
    for k in range(4):
        batch = x * (k + 1)
        means.append(batch.mean((0, 2, 3)))
        variances.append(batch.var((0, 2, 3)))
        mean = fraction * mean + means[-1]
        var = fraction * var + variances[-1]
        factor = fraction * factor + 1
        weights = [fraction * w for w in weights] + [1]
    weights = torch.tensor(weights, dtype=torch.float64).view(-1, 1)
    expected = [(weights * torch.stack(v)).sum(0) / weights.sum() for v in (means, variances)]
    torch.testing.assert_close(list(from_caffe(mean, var, factor)), expected)


def test_inverse_standard_deviation():
    var = random(0.0)
    var[0] = 0
    torch.testing.assert_close(var_from_inverse_std((var + 1e-5).rsqrt(), 1e-5), var)
    with pytest.raises(InputError, match="inverse_std: values of 0 or less"):
        var_from_inverse_std(-var, 1e-5)
    with pytest.raises(InputError, match=r"eps: 0.001 is not accepted: .* variance of -0.00099"):
        var_from_inverse_std((var + 1e-5).rsqrt(), 1e-3)


def test_other_eps(x):
    mean, var = random(), random()
    expected = F.batch_norm(x, mean, var, eps=1e-3)
    torch.testing.assert_close(F.batch_norm(x, mean, with_eps(var, 1e-3, 1e-5), eps=1e-5), expected)
    var[2] = 0
    with pytest.raises(InputError, match=r"eps: 0.001 is not accepted: .* variance of -0.00099"):
        with_eps(var, 1e-5, 1e-3)


def test_affine_that_has_statistics_folded_in(x):
    weight, bias = random(-0.5), random(-1)
    folded = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64) - 1e-5
    found = x.mean((0, 2, 3)), x.var((0, 2, 3))
    expected = x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    new_weight, new_bias = with_statistics(weight, bias, folded, found)
    torch.testing.assert_close(F.batch_norm(x, *found, new_weight, new_bias), expected)
    # Now it normalizes: in training it computes nearly the same, but for the biased variance.
    trained = F.batch_norm(x, None, None, new_weight, new_bias, training=True)
    torch.testing.assert_close(trained, expected, rtol=0.01, atol=0.01)
