"""What is done to a built layer, and how one sees that it has been done: the cells of a matrix.

A cell is *done*, and then what the function says holds; *refused*, by an InputError that names the
layer or says what it wants, with nothing changed; or *left*, named in a message or a report, with
nothing changed.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
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
    tune,
    unchanged_statistics,
    unfold,
    unfuse,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers.folded import is_folded
from bn_det.layers.freeze import is_frozen
from bn_det.layers.kinds import batch_norms
from kinds import fill

C = 4
MODES = ("training", "evaluation", "frozen")
DTYPES = (torch.float32, torch.bfloat16)


class Net(nn.Module):
    """A convolution and a layer, whose every parameter and statistic matters.

    Args:
        make: from the number of channels to the layer, to a list of one for each level that takes
            them in turn, or to a convolution that has the layer inside, as ``norm``.
        twin: makes what the layer is in training, where neither itself nor thaw can tell.

    Attributes:
        norm: what has all parameters and statistics.
        names: of the BatchNorm layers.
    """

    def __init__(self, make, mode, dtype, twin=None):
        super().__init__()
        torch.manual_seed(0)
        self.twin = twin
        made = make(C)
        is_inside = isinstance(made, nn.Conv2d)
        self.tower = nn.Sequential(*([made] if is_inside else [nn.Conv2d(3, C, 1), made]))
        norm = "tower.0.norm" if is_inside else "tower.1"
        self.in_turn = isinstance(made, nn.ModuleList)
        self.names = [f"{norm}.{k}" for k in range(len(made))] if self.in_turn else [norm]
        self.takes_list = getattr(made, "takes_list", False)
        fill(self)
        self.to(dtype).train(mode == "training")
        if mode == "frozen":
            freeze(self).train()

    def forward(self, x):
        domains = [0, 1] * (len(x) // 2)
        with image_sources(domains), roi_levels(domains):
            if self.takes_list:
                return torch.cat(forward_levels([self.tower], [x, x + 1]))
            if self.in_turn:
                return torch.cat([self.tower(x + k) for k in range(len(self.names))])
            return self.tower(x)

    @property
    def norm(self):
        return self.tower[1] if len(self.tower) > 1 else self.tower[0].norm

    @property
    def layers(self):
        return [self.get_submodule(name) for name in self.names]


def dtype_of(net):
    return next(net.parameters()).dtype


def images(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 5, 5, generator=generator) * 2 + 1).to(dtype)


def can_train(net):
    """On a CPU, and with an input that normalizes."""
    return not (net.training and any(isinstance(m, nn.SyncBatchNorm) for m in net.layers))


def copied(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def assert_unchanged(net, before):
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def moved(net):
    """The names of layers that a pass has changed."""
    before = copied(net)
    with torch.no_grad():
        net(images(dtype_of(net)))
    keys = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert all(k.startswith(tuple(net.names)) for k in keys)
    return [name for name in net.names if any(k.startswith(name) for k in keys)]


@torch.no_grad()
def evaluated(net):
    return copy.deepcopy(net).eval()(images(dtype_of(net)))


@torch.no_grad()
def called(net):
    """What a net gives in its mode."""
    return copy.deepcopy(net)(images(dtype_of(net)))


@torch.no_grad()
def trained(net):
    """What a net gives in training, where nothing is frozen."""
    if net.twin is None:
        of = thaw(copy.deepcopy(net))
    else:
        of = Net(net.twin, "training", dtype_of(net))
        assert not of.load_state_dict(net.state_dict(), strict=False).unexpected_keys
    return of.train()(images(dtype_of(net)))


@torch.no_grad()
def seen(net):
    """What each layer gets."""
    conv, x = net.tower[0], images(dtype_of(net))
    return [F.conv2d(x + k, conv.weight, conv.bias) for k in range(len(net.names))]


def assert_close(found, expected):
    tolerance = 1e-5 if found.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_function(net, expected):
    assert_same(evaluated(net), expected)


def assert_same(found, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 0.1  # a few roundings of weights
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def check_freeze(net, said):
    expected = evaluated(net)
    freeze(net)
    assert all(map(is_frozen, net.layers)) and not moved(net.train())
    assert not any(p.requires_grad for p in net.norm.parameters())
    with torch.no_grad():
        assert_same(net(images(expected.dtype)), expected)


def check_thaw(net, said):
    expected, parameters = evaluated(net), list(net.norm.parameters())
    thaw(net)
    assert not any(map(is_frozen, net.layers))
    assert all(p.requires_grad for p in net.norm.parameters())
    if parameters:
        assert list(map(id, net.norm.parameters())) == list(map(id, parameters))
    assert_same_function(net, expected)
    if can_train(net.train()) and net.layers[0].running_mean is not None:
        assert moved(net) == net.names


def check_convert(net, said):
    expected, layers, parameters = evaluated(net), net.layers, set(net.parameters())
    convert_batchnorm(net, lambda c: BatchNorm2d(c, ghost_size=2))
    assert net.layers == layers and set(net.parameters()) == parameters
    assert_same_function(net, expected)
    if said():
        return "left"
    assert all(layer.ghost_size == 2 for layer in thaw(net).layers)
    return None


def check_update(net, said, frozen=False, initial=True):
    before, outputs = copy.deepcopy(net), []
    report = update_bn_stats(
        net,
        [images(dtype_of(net))],
        1,
        initial=initial,
        frozen=frozen,
        call=lambda m, x: outputs.append(m(x)),
    )
    if not report.layers:
        assert said()
        return "left"
    found = [name for name in net.names if any(of.name.startswith(name) for of in report.layers)]
    assert found == net.names and all(of.name.startswith(tuple(found)) for of in report.layers)
    assert_close(outputs[0], trained(before))
    for layer, x in zip(net.layers, seen(net), strict=True):
        if not isinstance(layer, DomainBatchNorm2d):
            var, mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
            assert_close(layer.running_mean, mean.to(x.dtype))
            assert_close(layer.running_var, var.to(x.dtype))
    return None


def check_update_frozen(net, said):
    were_frozen = list(map(is_frozen, net.layers))
    found = check_update(net, said, frozen=True)
    assert list(map(is_frozen, net.layers)) == were_frozen
    return found


def fold(net):
    for module in net.norm.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.zero_()
            module.running_var.fill_(1)


def check_update_folded(net, said):
    fold(net)
    before = copied(net)
    try:
        return check_update(net, said, initial=False)
    except InputError:
        assert_unchanged(net, before)
        raise


def check_unfold(net, said):
    fold(net)
    expected, outputs = evaluated(net), []
    unfold(net, [images(expected.dtype)], 1, call=lambda m, x: outputs.append(m(x)))
    assert not any(map(is_folded, net.layers))
    assert_same_function(net, expected)
    assert_same(outputs[0], expected)


def check_fuse(net, said):
    net.eval()
    expected = evaluated(net)
    report = fuse(net)
    assert_same_function(net, expected)
    if report.left:
        assert list(report.left) == net.names and all(report.left.values())
        return "left"
    assert not batch_norms(net)
    return None


def check_unfuse(net, said):
    net.eval()
    expected, layers = evaluated(net), net.layers
    if fuse(net).left:
        with pytest.raises(InputError, match="no BatchNorm of this model has been fused"):
            unfuse(net)
        return "refused"
    unfuse(net)
    assert net.layers == layers
    assert_same_function(net, expected)
    return None


def check_tune(net, said):
    before, outputs = copied(net), called if can_train(net) else evaluated
    expected = outputs(net)
    report = tune(net)
    assert_same(outputs(net), expected)
    assert list(net.state_dict()) == list(before)
    if report.left:
        assert list(report.left) == net.names and all(report.left.values())
        return "left"
    assert report.tuned == net.names
    return None


def check_average(net, said):
    before = copied(net)
    average_population_statistics(net)  # of one process: that is it
    assert_unchanged(net, before)


def check_states(net, said):
    found = states(net).layers
    assert [state.name for state in found] == net.names
    needs = {p.requires_grad for p in net.norm.parameters()}
    for state, layer in zip(found, net.layers, strict=True):
        assert state.mode == ("training" if layer.training else "evaluation")
        assert (state.statistics == "frozen") == is_frozen(layer)
        if needs:
            assert state.affine == ("learns" if needs == {True} else "fixed")
        else:
            assert state.affine == ("none" if layer.weight is None else "constant")
    assert moved(net) == [state.name for state in found if state.statistics == "moving"]


def check_unchanged(net, said):
    before = copied(net)
    if any(state.statistics == "moving" for state in states(net).layers):
        words = f"unchanged_statistics: {net.names[0]}"
        with pytest.raises(InputError, match=words), unchanged_statistics(net):
            net(images(dtype_of(net)))
    else:
        with unchanged_statistics(net):
            net(images(dtype_of(net)))
    assert_unchanged(net, before)


def check_losses(net, said):
    before, modes, expected = copied(net), [m.training for m in net.modules()], evaluated(net)
    with torch.no_grad(), evaluated_losses(net):
        assert net.training
        found = net(images(expected.dtype))
    assert torch.equal(found, expected)
    assert_unchanged(net, before)
    assert [m.training for m in net.modules()] == modes


@torch.no_grad()
def check_no_update(net, said):
    before, expected = copied(net), copy.deepcopy(net)(images(dtype_of(net)))
    with no_population_update(net):
        found = net(images(expected.dtype))
    assert torch.equal(found, expected)
    assert_unchanged(net, before)


def check_trained_with(net, said):
    expected = evaluated(net)
    with torch.no_grad(), trained_with(net, "population"):
        found = net.train()(images(expected.dtype))
    layer = net.layers[0]
    if layer.running_mean is None and not isinstance(layer, DomainBatchNorm2d):
        return "done"  # there is no population: the batch, as in evaluation
    assert_close(found, expected)
    return None


def check_evaluated_with(net, said):
    frozen = all(map(is_frozen, net.layers))
    before, by_population = copied(net), evaluated(net)
    with torch.no_grad(), evaluated_with(net.eval(), "batch"):
        found = net(images(by_population.dtype))
    assert_unchanged(net, before)
    has_population = states(net).layers[0].statistics != "none"
    assert torch.equal(found, by_population) == (frozen or not has_population)


FUNCTIONS = {
    "freeze": check_freeze,
    "thaw": check_thaw,
    "convert_batchnorm": check_convert,
    "update_bn_stats": check_update,
    "update_bn_stats, frozen": check_update_frozen,
    "update_bn_stats, folded": check_update_folded,
    "unfold": check_unfold,
    "fuse": check_fuse,
    "unfuse": check_unfuse,
    "tune": check_tune,
    "average_population_statistics": check_average,
    "states": check_states,
    "unchanged_statistics": check_unchanged,
    "evaluated_losses": check_losses,
    "no_population_update": check_no_update,
    "trained_with": check_trained_with,
    "evaluated_with": check_evaluated_with,
}
_CHANGED_BEFORE = ("update_bn_stats, folded", "unfold", "fuse", "unfuse")
_RUN_AS_IT_IS = ("states", "unchanged_statistics", "no_population_update")


def every_cell(kinds):
    """Of a matrix with these kinds of layer: parametrizes function, kind, mode and dtype."""

    def parametrized(test):
        for names, values, ids in (
            ("dtype", DTYPES, str),
            ("mode", MODES, None),
            ("kind", kinds, None),
            ("function", FUNCTIONS, None),
        ):
            test = pytest.mark.parametrize(names, values, ids=ids)(test)
        return test

    return parametrized


def expected_of(function, mode, otherwise, is_frozen_kind):
    """What a cell is to be.

    Args:
        otherwise: what it is by its kind, in whatever mode: more follows from the mode.
        is_frozen_kind: whether the layer is made frozen.
    """
    is_frozen_one = mode == "frozen" or is_frozen_kind
    by_mode = ("update_bn_stats", "update_bn_stats, folded")
    if function in by_mode and (is_frozen_one or mode == "evaluation"):
        return "left"
    if function == "tune" and not is_frozen_one:
        return "left"
    if function == "update_bn_stats, frozen" and not is_frozen_one and mode == "evaluation":
        return "left"
    on_frozen_ones = ("trained_with", "evaluated_with")
    return "done" if is_frozen_one and function in on_frozen_ones else otherwise


def check_cell(net, function, expected, caplog):
    """That a function does, refuses or leaves what is expected, and what follows from that."""
    if not can_train(net) and function in _RUN_AS_IT_IS:
        return  # torch refuses it on a CPU
    before, types = copied(net), [type(m) for m in net.modules()]

    def said():
        words = (*net.names, "nothing to update")
        return [m for m in caplog.messages if any(w in m for w in words)]

    with caplog.at_level(logging.INFO):
        try:
            found = FUNCTIONS[function](net, said) or "done"
        except (InputError, ValueError) as e:
            assert str(e)
            found = "refused"
    assert found == expected, f"{found}, and is to be {expected}"
    if found in ("refused", "left") and function not in _CHANGED_BEFORE:
        assert [type(m) for m in net.modules()] == types
        assert_unchanged(net, before)
