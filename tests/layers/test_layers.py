"""Norms by name, and heads on all levels."""

from functools import partial

import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, forward_levels
from bn_det.errors import InputError
from bn_det.layers import BATCH_NORMS, norm_factory
from cases import CASES, check_as_in_float64

OTHERS = {"GN": partial(nn.GroupNorm, 2)}
CHOICES = {"statistics": "shared", "population": "per_domain", "affine": "per_domain"}


LEVELS = partial(DomainBatchNorm2d, num_domains=3, **CHOICES)


@pytest.mark.parametrize("layer", [BatchNorm2d, LEVELS])
def test_norms_by_name_and_callable(layer):
    assert norm_factory("", layer, OTHERS) is None
    assert norm_factory(None, layer, OTHERS) is None
    assert isinstance(norm_factory("GN", layer, OTHERS)(32), nn.GroupNorm)
    assert norm_factory(nn.Identity, layer, OTHERS) is nn.Identity
    found = {
        name: norm_factory(name, layer, OTHERS, ghost_size=3, renorm=(2, 1))(4)
        for name in BATCH_NORMS
    }
    kind = BatchNorm2d if layer is BatchNorm2d else DomainBatchNorm2d
    assert all(type(norm) is kind for norm in found.values())
    assert {name for name, norm in found.items() if norm.group == "world"} == {"SyncBN"}
    assert {name for name, norm in found.items() if norm.ghost_size == 3} == {"GhostBN"}
    assert {name for name, norm in found.items() if norm.renorm == (2, 1)} == {"BRN"}


def test_unknown_norm():
    with pytest.raises(
        InputError, match=r"MODEL.X.NORM: 'bn' .*\['', 'BN', 'SyncBN', 'GhostBN', 'BRN', .*'GN'\]"
    ):
        norm_factory("bn", BatchNorm2d, OTHERS, "MODEL.X.NORM")


def test_forward_levels_sees_all_levels():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    joint = DomainBatchNorm2d(4, 2, statistics="shared")
    features = [torch.randn(2, 3, 6, 5), torch.randn(2, 3, 2, 2)]
    found = forward_levels([nn.Sequential(conv, nn.Sequential(joint)), nn.ReLU()], features)
    expected = joint([conv(x) for x in features])
    torch.testing.assert_close(found, [y.relu() for y in expected])


@pytest.mark.parametrize("activation", [nn.ReLU(), None])
def test_forward_levels_takes_a_convolution_with_a_norm_apart(activation):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    joint = DomainBatchNorm2d(4, 2, statistics="shared")
    features = [torch.randn(2, 3, 6, 5), torch.randn(2, 3, 2, 2)]
    expected = joint([conv(x) for x in features])
    conv.norm, conv.activation = joint, activation
    found = forward_levels([conv], features)
    torch.testing.assert_close(found, [y.relu() if activation else y for y in expected])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_as_float64(name, dtype):
    """Statistics, and gradients of weights, to float32; outputs to a rounding."""
    with torch.autocast("cpu", dtype):
        check_as_in_float64(name, "cpu", dtype, torch.contiguous_format)
