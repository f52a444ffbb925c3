"""Averages of several models' weights and statistics, against brute force."""

import pytest
import torch
from torch import nn

from bn_det import DomainBatchNorm2d
from bn_det.errors import InputError
from bn_det.population.averaged_weights import averaged_state


def make_state(seed):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"bn": nn.BatchNorm2d(3), "levels": DomainBatchNorm2d(2, 2)})
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
        else:
            t.fill_(seed)
    return model.half().state_dict() if seed > 10 else model.state_dict()


@pytest.mark.parametrize("how", ["copied", "averaged", "pooled"])
@pytest.mark.parametrize("first", [1, 11])
def test_averages(how, first):
    states = [make_state(first + k) for k in range(3)]
    found = averaged_state(states, how)
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        every = torch.stack([state[name].double() for state in states])
        expected = every.mean(0)
        if ("running" in name and how == "copied") or name.endswith("tracked"):
            expected = every[-1]
        elif name.endswith("running_var") and how == "pooled":
            means = torch.stack([s[name.replace("_var", "_mean")].double() for s in states])
            expected = expected + means.var(0, correction=0)
        assert value.dtype == states[0][name].dtype
        rounding = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
        torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=0)


def test_states_that_differ():
    first, other = make_state(1), make_state(2)
    other["bn.weight"] = torch.zeros(4)
    with pytest.raises(InputError, match=r"1 and 2 .*bn.weight is \(3,\) in the first, and \(4,\)"):
        averaged_state([first, other], "copied")
    del other["bn.weight"]
    with pytest.raises(InputError, match="bn.weight is .* in the first, and nothing in the other"):
        averaged_state([first, first, other], "copied")
    with pytest.raises(InputError, match="statistics: 'mean' is not accepted"):
        averaged_state([first], "mean")
