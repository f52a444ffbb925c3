"""The layers in their choices: how to make each and how to call it, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bn_det
from bn_det import BatchNorm2d, DomainBatchNorm2d, forward_levels
from bn_det.layers import kernels
from reference import EIGHT_CHOICES

C = 5
ONE = [(5, 4, 3)]
LEVELS = [(3, 5, 4), (0, 3, 2), (3, 2, 2)]
AS_MANY = [(5, 5, 4), (5, 3, 2), (5, 2, 2)]


class Case(NamedTuple):
    """A layer, and a call of it.

    Attributes:
        sizes: N, H and W of each input.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, list[Tensor]], Sequence[Tensor]]
    sizes: list[tuple[int, int, int]]


def of_one(layer, xs):
    return [layer(xs[0])]


def of_all(layer, xs):
    return layer(xs)


def of_all_with_relu(layer, xs):
    return forward_levels([layer, nn.ReLU()], xs)


def random_order(layer, xs):
    torch.manual_seed(0)
    return [layer(xs[0])]


def of_groups(layer, xs, device="cpu"):
    groups = torch.tensor([1, 0, 1, 1, 0], device=device)
    with bn_det.ghost_groups(layer, groups):
        return layer(xs) if len(xs) > 1 else [layer(xs[0])]


def of_sources(layer, xs):
    with bn_det.image_sources([1, 0, 1, 1, 0]):
        return layer(xs) if layer.num_levels else [layer(xs[0])]


def of_rois(layer, xs, device="cpu"):
    levels = torch.tensor([2, 0, 2, 2, 0], device=device)  # none of level 1
    with bn_det.roi_levels(levels):
        return [layer(xs[0])]


def with_extra_images(layer, xs):
    if not layer.training:
        return [layer(xs[0])]
    with bn_det.virtual_batch(layer, xs[1].detach()):
        return [layer(xs[0])]


def with_extra_levels(layer, xs):
    if not layer.training:
        return layer(xs)
    with bn_det.virtual_batch(layer, [x.detach().flip(0) for x in xs]):
        return layer(xs)


def domain_layer(choices, **kwargs):
    names = ("statistics", "population", "affine")
    return DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)), **kwargs)


SHARED = ("shared", "shared", "shared")

CASES = {
    "BatchNorm2d": Case(lambda: BatchNorm2d(C), of_one, ONE),
    "nothing": Case(lambda: BatchNorm2d(C), of_one, [(0, 4, 3)]),
    "SyncBN": Case(lambda: BatchNorm2d(C, group="world"), of_one, ONE),
    "cumulative": Case(lambda: BatchNorm2d(C, momentum=None), of_one, ONE),
    "ghosts": Case(lambda: BatchNorm2d(C, ghost_size=2), of_one, ONE),
    "random ghosts": Case(
        lambda: BatchNorm2d(C, ghost_size=2, ghost_order="random"), random_order, ONE
    ),
    "groups": Case(lambda: BatchNorm2d(C), of_groups, ONE),
    "groups on the device": Case(
        lambda: BatchNorm2d(C), lambda layer, xs: of_groups(layer, xs, xs[0].device), ONE
    ),
    "tested by the batch": Case(lambda: BatchNorm2d(C, eval_statistics="batch"), of_one, ONE),
    "trained by the population": Case(
        lambda: BatchNorm2d(C, train_statistics="population"), of_one, ONE
    ),
    "renorm": Case(lambda: BatchNorm2d(C, renorm=(1.5, 0.5)), of_one, ONE),
    "L1": Case(lambda: bn_det.L1BatchNorm2d(C), of_one, ONE),
    "virtual batch": Case(lambda: BatchNorm2d(C), with_extra_images, [*ONE, (4, 4, 3)]),
    "shuffled": Case(lambda: bn_det.shuffled(nn.Sequential(BatchNorm2d(C))), of_one, ONE),
    **{
        "levels " + "-".join(choices): Case(partial(domain_layer, choices), of_all, LEVELS)
        for choices in EIGHT_CHOICES
    },
    **{
        f"levels {choices[0]}, ReLU": Case(partial(domain_layer, choices), of_all_with_relu, LEVELS)
        for choices in (SHARED, ("per_domain", "shared", "per_domain"))
    },
    "levels, ghosts": Case(partial(domain_layer, SHARED, ghost_size=2), of_all, AS_MANY),
    "levels, groups": Case(partial(domain_layer, SHARED), of_groups, AS_MANY),
    "levels, renorm": Case(partial(domain_layer, SHARED, renorm=(1.5, 0.5)), of_all, LEVELS),
    "levels, SyncBN": Case(partial(domain_layer, SHARED, group="world"), of_all, LEVELS),
    "levels, virtual batch": Case(partial(domain_layer, SHARED), with_extra_levels, AS_MANY),
    "sources": Case(lambda: bn_det.SourceBatchNorm2d(C, 2), of_sources, ONE),
    "sources of levels": Case(
        lambda: bn_det.SourceBatchNorm2d(C, 2, 3, statistics="shared"), of_sources, AS_MANY
    ),
    "RoI levels": Case(lambda: bn_det.RoILevelBatchNorm2d(C, 3), of_rois, ONE),
    "RoI levels on the device": Case(
        lambda: bn_det.RoILevelBatchNorm2d(C, 3),
        lambda layer, xs: of_rois(layer, xs, xs[0].device),
        ONE,
    ),
    "RoI levels, shared": Case(
        lambda: bn_det.RoILevelBatchNorm2d(C, 3, statistics="shared"), of_rois, ONE
    ),
}


def make_layer(case):
    """With weights and statistics that matter."""
    layer = case.make()
    for t in (*layer.parameters(), *layer.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
    return layer


def make_data(case):
    """Inputs of a call, and as many gradients."""

    def make():
        return [torch.randn(n, C, h, w) * (k + 1) + k for k, (n, h, w) in enumerate(case.sizes)]

    return make(), make()


def run(
    case, layer, data, device, dtype, memory_format=torch.contiguous_format, prepare=lambda m: m
):
    """Two calls in training mode and one in evaluation mode, of a copy of a layer on a device.

    Args:
        prepare: from the copy to what is called.

    Returns:
        Outputs and gradients of each call, then the buffers: all tensors, in the same order for
        any device. The layer's state is float32, as in mixed precision, or else of the type.
    """
    wide = torch.promote_types(dtype, torch.float32)
    layer = prepare(copy.deepcopy(layer).to(device, wide))
    found = []
    for xs, grads in data:
        layer.train(len(found) < 2)
        xs = [x.to(device, dtype).to(memory_format=memory_format).requires_grad_() for x in xs]
        ys = list(case.call(layer, xs))
        inputs = [*xs[: len(ys)], *layer.parameters()]
        grads = [g.to(device, dtype) for g in grads[: len(ys)]]
        found.append([*ys, *torch.autograd.grad(ys, inputs, grads, materialize_grads=True)])
    return [*found, list(layer.buffers())]


TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Of the largest value of a tensor, or of 1: ten times the error of the CPU's kernels and more."""


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def check_as_in_float64(name, device, dtype, memory_format):
    """That a case is computed as by ATen's kernels on the CPU in float64, from the same values."""
    case = CASES[name]
    layer = make_layer(case)
    # Both get the values that the type can hold.
    data = [[[x.to(dtype) for x in xs] for xs in make_data(case)] for _ in range(3)]
    with kernels.implementation("aten"):
        expected = run(case, layer, data, "cpu", torch.float64)
    found = run(case, layer, data, device, dtype, memory_format)
    for of_call, wanted in zip(found, expected, strict=True):
        assert all(t.device.type == device for t in of_call)
        assert_same(of_call, wanted, TOLERANCE[dtype])
    num_outputs = len(found[0]) - len(list(layer.parameters()))
    for y in found[0][: num_outputs // 2]:
        assert y.dtype == dtype
        # An empty part, as of a level without RoIs, has torch.cat forget it.
        assert "RoI" in name or y.is_contiguous(memory_format=memory_format)
