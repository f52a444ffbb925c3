"""No tensor of the CPU meets one of another device, of a GPU say; this needs none.

Whether a GPU computes the right values is in test_cuda.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from bn_det import BatchNorm2d, freeze, fuse, tune
from bn_det.layers import kernels
from cases import CASES, C, make_data, make_layer, run
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


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0]),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_reading_of_a_device_is_found(read):
    """What would wait for a GPU raises there, and so does it in test_one_device."""
    with one_device(), pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


ON_THE_HOST = {"groups", "groups on the device", "levels, groups", "sources", "sources of levels"}
ON_THE_HOST |= {"RoI levels", "RoI levels on the device", "RoI levels, shared", "cumulative"}
"""Cases that read values, which fake tensors do not have on the CPU, either."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(set(CASES) - ON_THE_HOST))
def test_fake_cuda(name, training):
    """Forward, where a tensor says that it is of a GPU; autograd's backward pass needs a driver."""
    case = CASES[name]
    # Triton's kernels take no fake tensors.
    with one_device(), FakeTensorMode(), kernels.implementation("aten"):
        with torch.device("cuda"):
            layer = case.make().train(training)
            xs = [torch.empty(n, C, h, w, requires_grad=True) for n, h, w in case.sizes]
        ys = case.call(layer, xs)
        assert {t.device.type for t in (*ys, *layer.buffers())} == {"cuda"}
        assert [y.shape for y in ys] == [x.shape for x in xs[: len(ys)]]


def test_another_default_device():
    """Of a user who makes models on a GPU: what is on the CPU stays there."""
    conv, x = nn.Conv2d(3, 4, 1), torch.randn(4, 3, 5, 5)
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    layer = BatchNorm2d(3, ghost_size=2)
    expected, tuned, fused = model(x), copy.deepcopy(model), copy.deepcopy(model)
    torch.set_default_device("meta")
    try:
        tune(freeze(tuned))
        fuse(fused)
        found = [fused(x), tuned.eval()(x), layer(x)]
    finally:
        torch.set_default_device(None)
    for y in found[:2]:
        torch.testing.assert_close(y, expected)
    assert found[2].device.type == "cpu"
