"""Norms by name, conversion of built models, and heads on all levels."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, convert_batchnorm, forward_levels
from bn_det.errors import InputError
from bn_det.layers import BATCH_NORMS, norm_factory

OTHERS = {"GN": partial(nn.GroupNorm, 2)}
CHOICES = {"statistics": "shared", "population": "per_domain", "affine": "per_domain"}


LEVELS = partial(DomainBatchNorm2d, num_domains=3, **CHOICES)


@pytest.mark.parametrize("layer", [BatchNorm2d, LEVELS])
def test_norms_by_name_and_callable(layer):
    assert norm_factory("", layer, OTHERS) is None
    assert norm_factory(None, layer, OTHERS) is None
    assert isinstance(norm_factory("GN", layer, OTHERS)(4), nn.GroupNorm)
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


def model():
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(shared, nn.ReLU()),
        nn.BatchNorm2d(4, eps=0.1, momentum=0.3, affine=False).eval(),
        shared,
        nn.BatchNorm2d(4, track_running_stats=False),
        DomainBatchNorm2d(4, 2),
        nn.SyncBatchNorm(4),
    ).double()
    for t in (*net.parameters(), *net.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
    return net


def test_convert_keeps_everything():
    net = model()
    before = copy.deepcopy(net)
    parameters, domains = list(net.parameters()), net[5]
    assert convert_batchnorm(net, BatchNorm2d) is net
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(net.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert net[1][0] is net[3] and type(net[3]) is BatchNorm2d
    assert net[5] is domains and type(domains.get_submodule("0")) is BatchNorm2d
    assert (net[2].eps, net[2].momentum, net[2].training) == (0.1, 0.3, False)
    assert type(net[6]) is BatchNorm2d
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for ours, theirs in zip(net[1:5], before[1:5], strict=True):
        torch.testing.assert_close(ours(x), theirs(x))


def test_convert_a_single_layer():
    old = nn.BatchNorm2d(4).half().eval()
    new = convert_batchnorm(old, BatchNorm2d)
    assert type(new) is BatchNorm2d and new.weight is old.weight
    assert new.running_var is old.running_var and not new.training


def test_convert_to_a_layer_without_place():
    with pytest.raises(ValueError, match="GroupNorm cannot hold the running_mean"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), partial(nn.GroupNorm, 2))


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
