"""No tensor of the CPU meets one of another device, of a GPU say; this needs none.

Whether a GPU computes the right values is in test_cuda.py.
"""

import pytest
import torch

from cases import CASES, make_data, make_layer, run
from devices import one_device

READ_THERE = {"cumulative", "groups on the device", "RoI levels on the device"}
"""Cases that read values of the device, of which meta has none."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(set(CASES) - READ_THERE))
def test_one_device(name, dtype):
    case = CASES[name]
    layer = make_layer(case)
    data = [make_data(case) for _ in range(3)]
    with one_device():
        found = run(case, layer, data, "meta", dtype)
    assert all(t.device.type == "meta" for of_call in found for t in of_call)


def test_two_devices_are_refused():
    x, y = torch.ones(3, device="meta"), torch.ones(3)
    with one_device(), pytest.raises(AssertionError, match="index_select"):
        x.index_select(0, y.long())
