"""What is done to built layers: every function, kind of layer, mode and type; no cell is silent.

A cell is *done*, and then what the function says holds; *refused*, by an InputError that names the
layer or says what it wants, with nothing changed; or *left*, named in a message or a report, with
nothing changed.
"""

import copy
import logging

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    FrozenBatchNorm,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    average_population_statistics,
    convert_batchnorm,
    evaluated_losses,
    evaluated_with,
    forward_levels,
    freeze,
    fuse,
    image_sources,
    no_population_update,
    roi_levels,
    states,
    thaw,
    trained_with,
    unchanged_statistics,
    unfold,
    unfuse,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers.freeze import is_folded, is_frozen
from bn_det.layers.kinds import batch_norms
from kinds import fill

C = 4


class Plain(nn.BatchNorm2d):
    pass


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


KINDS = {
    "torch": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "a subclass": Plain,
    "with an activation": WithActivation,
    "ours": BatchNorm2d,
    "SyncBN": lambda c: BatchNorm2d(c, group="world"),
    "ghost": lambda c: BatchNorm2d(c, ghost_size=2),
    "renorm": lambda c: BatchNorm2d(c, renorm=(3, 5)),
    "L1": L1BatchNorm2d,
    "levels": lambda c: DomainBatchNorm2d(c, 2, affine="per_domain"),
    "shared levels": lambda c: DomainBatchNorm2d(c, 2, statistics="shared", population="shared"),
    "sources": lambda c: SourceBatchNorm2d(c, 2),
    "RoI levels": lambda c: RoILevelBatchNorm2d(c, 2),
    "torchvision's frozen": FrozenBatchNorm2d,
    "no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
}
MODES = ("training", "evaluation", "frozen")
DTYPES = (torch.float32, torch.bfloat16)


class Net(nn.Module):
    def __init__(self, kind, mode, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Conv2d(3, C, 1), KINDS[kind](C))
        fill(self)
        self.takes_list = getattr(self.layer, "takes_list", False)
        self.takes_list = getattr(self.layer, "takes_list", False)
        self.to(dtype).train(mode == "training")
        if mode == "frozen":
            freeze(self).train()

    def forward(self, x):
        domains = [0, 1] * (len(x) // 2)
        with image_sources(domains), roi_levels(domains):
            if self.takes_list:
                return torch.cat(forward_levels([self.tower], [x, x + 1]))
            return self.tower(x)

    @property
    def layer(self):
        return self.tower[1]


def images(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 5, 5, generator=generator) * 2 + 1).to(dtype)


def can_train(net):
    """On a CPU, and with an input that normalizes."""
    return not (isinstance(net.layer, nn.SyncBatchNorm) and net.training)


def moves(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        net(images(next(net.parameters()).dtype))
    return any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())


def evaluated(net):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(images(next(net.parameters()).dtype))


def assert_same_function(net, expected, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # a few roundings of weights and outputs
    scale = expected.abs().max()
    assert (evaluated(net) - expected).abs().max() <= tolerance * scale


def check_freeze(net, said):
    freeze(net)
    assert is_frozen(net.layer) and not moves(net.train())
    assert not any(p.requires_grad for p in net.layer.parameters())


def check_thaw(net, said):
    thaw(net)
    assert not is_frozen(net.layer)
    assert all(p.requires_grad for p in net.layer.parameters())
    if can_train(net.train()) and net.layer.running_mean is not None:
        assert moves(net)


def check_convert(net, said):
    expected, layer = evaluated(net), net.layer
    convert_batchnorm(net, lambda c: BatchNorm2d(c, ghost_size=2))
    assert net.layer is layer
    assert_same_function(net, expected, expected.dtype)
    if said():
        return "left"
    thawed = thaw(net).layer
    assert thawed.ghost_size == 2
    return None


def check_update(net, said):
    net = net.train(net.training)
    report = update_bn_stats(net, [images(next(net.parameters()).dtype)], 1, initial=True)
    if not report.layers:
        assert said()
        return "left"
    assert all(of.name.startswith("tower.1") for of in report.layers)
    return None


def check_update_frozen(net, said):
    batch = [images(next(net.parameters()).dtype)]
    report = update_bn_stats(net, batch, 1, initial=True, frozen=True)
    if not report.layers:
        assert said()
        return "left"
    assert is_frozen(net.layer) or net.training
    return None


def check_unfold(net, said):
    for module in net.layer.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.zero_()
            module.running_var.fill_(1)
    expected = evaluated(net)
    unfold(net, [images(next(net.parameters()).dtype)], 1)
    assert not is_folded(net.layer)
    assert_same_function(net, expected, expected.dtype)


def check_fuse(net, said):
    net.eval()
    expected = evaluated(net)
    report = fuse(net)
    assert_same_function(net, expected, expected.dtype)
    if report.left:
        assert list(report.left) == ["tower.1"] and report.left["tower.1"]
        return "left"
    assert not batch_norms(net)
    return None


def check_unfuse(net, said):
    net.eval()
    expected, layer = evaluated(net), net.layer
    if fuse(net).left:
        with pytest.raises(InputError, match="no BatchNorm of this model has been fused"):
            unfuse(net)
        return "refused"
    unfuse(net)
    assert net.layer is layer
    assert_same_function(net, expected, expected.dtype)
    return None


def check_average(net, said):
    before = copy.deepcopy(net.state_dict())
    average_population_statistics(net)  # of one process: that is it
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def check_states(net, said):
    (state,) = states(net).layers
    assert (state.statistics == "frozen") == is_frozen(net.layer)
    if can_train(net):
        assert moves(net) == (state.statistics == "moving")


def check_unchanged(net, said):
    before = copy.deepcopy(net.state_dict())
    (state,) = states(net).layers
    if state.statistics == "moving":
        words = "unchanged_statistics: tower.1"
        with pytest.raises(InputError, match=words), unchanged_statistics(net):
            net(images(next(net.parameters()).dtype))
    else:
        with unchanged_statistics(net):
            net(images(next(net.parameters()).dtype))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def check_losses(net, said):
    before, expected = copy.deepcopy(net.state_dict()), evaluated(net)
    with torch.no_grad(), evaluated_losses(net):
        assert net.training
        found = net(images(expected.dtype))
    assert torch.equal(found, expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def check_no_update(net, said):
    before = copy.deepcopy(net.state_dict())
    with no_population_update(net):
        net(images(next(net.parameters()).dtype))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def check_trained_with(net, said):
    expected = evaluated(net)
    with torch.no_grad(), trained_with(net, "population"):
        found = net.train()(images(expected.dtype))
    if net.layer.running_mean is None and not isinstance(net.layer, DomainBatchNorm2d):
        return "done"  # there is no population: the batch, as in evaluation
    assert_close(found, expected)
    return None


def check_evaluated_with(net, said):
    frozen = is_frozen(net.layer)
    before = copy.deepcopy(net.state_dict())
    by_population = evaluated(net)
    with torch.no_grad(), evaluated_with(net.eval(), "batch"):
        found = net(images(by_population.dtype))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    has_population = states(net).layers[0].statistics != "none"
    assert torch.equal(found, by_population) == (frozen or not has_population)


def assert_close(found, expected):
    tolerance = 1e-5 if found.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FUNCTIONS = {
    "freeze": check_freeze,
    "thaw": check_thaw,
    "convert_batchnorm": check_convert,
    "update_bn_stats": check_update,
    "update_bn_stats, frozen": check_update_frozen,
    "unfold": check_unfold,
    "fuse": check_fuse,
    "unfuse": check_unfuse,
    "average_population_statistics": check_average,
    "states": check_states,
    "unchanged_statistics": check_unchanged,
    "evaluated_losses": check_losses,
    "no_population_update": check_no_update,
    "trained_with": check_trained_with,
    "evaluated_with": check_evaluated_with,
}
NOT_DONE = {
    "freeze": {"no statistics": "refused"},
    "convert_batchnorm": {"with an activation": "left", "levels": "left", "shared levels": "left",
                          "torchvision's frozen": "left", "sources": "refused",
                          "RoI levels": "refused"},
    "unfold": {"no affine": "refused", "no statistics": "refused", "sources": "refused",
               "RoI levels": "refused"},
    "fuse": {"with an activation": "left", "no statistics": "left", "sources": "left",
             "RoI levels": "left"},
    "unfuse": {"with an activation": "refused", "no statistics": "refused", "sources": "refused",
               "RoI levels": "refused"},
    "update_bn_stats": {"L1": "left", "no statistics": "left", "torchvision's frozen": "left"},
    "trained_with": {"L1": "refused", "with an activation": "refused"},
    "evaluated_with": {"L1": "refused", "with an activation": "refused"},
}  # fmt: skip
"""What is not done, in whatever mode; more follows from the mode."""


def expected_of(function, kind, mode):
    is_frozen_one = mode == "frozen" or kind == "torchvision's frozen"
    if function == "update_bn_stats" and (is_frozen_one or mode == "evaluation"):
        return "left"
    if function == "update_bn_stats, frozen":
        if is_frozen_one:
            return "done"
        if mode == "evaluation" or kind in ("L1", "no statistics"):
            return "left"
        return "done"
    if function in ("trained_with", "evaluated_with") and is_frozen_one:
        return "done"
    if function == "fuse" and kind == "L1":
        return "done"
    return NOT_DONE.get(function, {}).get(kind, "done")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_cell(function, kind, mode, dtype, caplog):
    if mode == "frozen" and kind == "no statistics":
        with pytest.raises(InputError, match="cannot be frozen"):
            Net(kind, mode, dtype)
        return
    net = Net(kind, mode, dtype)
    if not can_train(net) and function in (
        *("states", "unchanged_statistics", "no_population_update"),
    ):
        return  # torch refuses it on a CPU
    before, types = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]

    def said():
        return [m for m in caplog.messages if "tower.1" in m or "nothing to update" in m]

    with caplog.at_level(logging.INFO):
        try:
            found = FUNCTIONS[function](net, said) or "done"
        except (InputError, ValueError) as e:
            assert str(e)
            found = "refused"
    assert found == expected_of(function, kind, mode)
    if found in ("refused", "left") and function not in ("unfold", "fuse", "unfuse"):
        assert [type(m) for m in net.modules()] == types
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_frozen_class_is_used():
    assert isinstance(Net("torch", "frozen", torch.float32).layer, FrozenBatchNorm)
