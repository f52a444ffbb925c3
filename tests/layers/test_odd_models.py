"""Models that hardly can be looked at: no function ends in an error of torch's."""

import pytest
import torch
from torch import nn

from bn_det import (
    freeze,
    fuse,
    states,
    unchanged_statistics,
    unfold,
    unfuse,
    update_bn_stats,
)
from bn_det.errors import InputError

C = 3


class WithoutEps(nn.Module):
    """As maskrcnn-benchmark's FrozenBatchNorm2d."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(C) + 0.5)

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def test_a_frozen_layer_without_eps():
    model = nn.Sequential(nn.Conv2d(C, C, 1), WithoutEps()).eval()
    x = torch.randn(4, C, 3, 3)
    (state,) = states(model).layers
    assert state.statistics == "frozen"
    report = update_bn_stats(model, [x], 1, frozen=True)
    assert [of.name for of in report.layers] == ["1"]
    with torch.no_grad():
        expected = model(x)
        assert fuse(model).fused == ["1"]
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        again = unfuse(nn.Sequential(nn.Conv2d(C, C, 1), WithoutEps()).eval(), model.state_dict())
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)


def test_a_lazy_layer(caplog):
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(C))
    update_bn_stats(model[:1], [torch.randn(4, C, 3, 3)], 1)
    assert "it has not been called yet" in caplog.text
    with pytest.raises(InputError, match="unfold: no layer is folded"):
        unfold(model, [torch.randn(4, C, 3, 3)], 1)
    with unchanged_statistics(model):
        pass
    assert states(model).layers[0].contradictions


def test_a_scripted_model():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).eval())
    assert states(model).layers == []
    assert fuse(model) == ([], {})


def test_a_model_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    assert [state.name for state in states(model).layers] == ["1"]
    freeze(model, affine=False)
    assert states(model).layers[0].statistics == "frozen"
