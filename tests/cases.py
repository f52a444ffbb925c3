"""The layers in their choices: how to make each and how to call it, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bn_det
from bn_det import BatchNorm2d, DomainBatchNorm2d
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


def run(case, layer, data, device, dtype, memory_format=torch.contiguous_format):
    """Two calls in training mode and one in evaluation mode, of a copy of a layer on a device.

    Returns:
        Outputs and gradients of each call, then the buffers: all tensors, in the same order for
        any device. The layer's state is float32, as in mixed precision, or else of the type.
    """
    wide = torch.promote_types(dtype, torch.float32)
    layer = copy.deepcopy(layer).to(device, wide)
    found = []
    for xs, grads in data:
        layer.train(len(found) < 2)
        xs = [x.to(device, dtype).to(memory_format=memory_format).requires_grad_() for x in xs]
        ys = list(case.call(layer, xs))
        inputs = [*xs[: len(ys)], *layer.parameters()]
        grads = [g.to(device, dtype) for g in grads[: len(ys)]]
        found.append([*ys, *torch.autograd.grad(ys, inputs, grads, materialize_grads=True)])
    return [*found, list(layer.buffers())]
