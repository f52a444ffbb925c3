"""Layers of every kind, and inputs that all of them take."""

from functools import partial

import pytest
import torch
from torch import nn

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    image_sources,
    roi_levels,
)
from reference import EIGHT_CHOICES

C, SOURCES = 4, [0, 1, 0, 1, 1, 0]
SHAPES = [(6, C, 3, 5), (6, C, 2, 2)]
TENSOR_KINDS = {
    "torch": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "ours": BatchNorm2d,
    "SyncBN": partial(BatchNorm2d, group="world"),
    "GhostBN": partial(BatchNorm2d, ghost_size=2),
    "L1BN": L1BatchNorm2d,
    "sources": lambda c: SourceBatchNorm2d(c, 2),
    "RoI levels": lambda c: RoILevelBatchNorm2d(c, 2),
}
"""Those that take one tensor, from the number of channels."""

KINDS = {
    "plain": lambda **kwargs: BatchNorm2d(C, **kwargs),
    "ghost": lambda **kwargs: BatchNorm2d(C, ghost_size=2, **kwargs),
    "sources": lambda **kwargs: SourceBatchNorm2d(C, 2, **kwargs),
    "rois": lambda **kwargs: RoILevelBatchNorm2d(C, 2, statistics="shared", **kwargs),
    **{
        "-".join(choices): lambda choices=choices, **kwargs: DomainBatchNorm2d(
            C,
            2,
            **dict(zip(("statistics", "population", "affine"), choices, strict=True)),
            **kwargs,
        )
        for choices in EIGHT_CHOICES
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64) * (k + 1) + k
        ).requires_grad_()
        for k, shape in enumerate(SHAPES)
    ]


def inputs_of(kind, seed=0):
    """Those that a kind takes."""
    return inputs(seed)[: 1 if kind in ("plain", "ghost", "sources", "rois") else 2]


def make(kind, **kwargs):
    """A layer whose every parameter and statistic matters."""
    torch.manual_seed(0)
    return fill(KINDS[kind](**kwargs).double())


def fill(module):
    """Give a module a state in which every parameter and statistic matters."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if t.is_floating_point():
            low = -0.5 if name.endswith(("bias", "mean")) else 0.5
            nn.init.uniform_(t, low, low + 1.5)
    return module


def call(layer, xs, sources=SOURCES):
    """The sources of images are also the levels of RoIs."""
    for kind, scope in ((SourceBatchNorm2d, image_sources), (RoILevelBatchNorm2d, roi_levels)):
        if isinstance(layer, kind):
            with scope(sources):
                return [layer(xs[0])]
    return layer(xs) if isinstance(layer, DomainBatchNorm2d) else [layer(xs[0])]


def outputs_and_gradients(layer, xs):
    ys = call(layer, xs)
    sum((y**3).sum() for y in ys).backward()
    grads = [x.grad for x in xs[: len(ys)]] + [p.grad for p in layer.parameters()]
    return [y.detach() for y in ys], grads


class ConvNormReLU(nn.Conv2d):
    """As Detectron2's Conv2d."""

    def __init__(self, out_channels, norm):
        super().__init__(4, out_channels, 3, padding=1)
        self.norm, self.activation = norm, nn.ReLU()

    def forward(self, x):
        x = super().forward(x)
        return self.activation(x if self.norm is None else self.norm(x))


class NormAndMore(nn.BatchNorm2d):
    """As timm's, with weights in what follows."""

    def __init__(self, c, order=("drop", "act"), p=0.5):
        super().__init__(c)
        children = {"drop": nn.Dropout(p), "act": nn.PReLU(c)}
        self.order = order
        for name in ("drop", "act"):
            self.add_module(name, children[name])

    def forward(self, x):
        x = super().forward(x)
        for name in self.order:
            x = getattr(self, name)(x)
        return x
