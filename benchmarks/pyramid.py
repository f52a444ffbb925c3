"""The feature pyramid of a 640x800 image, and how five levels are normalized together.

What the benchmarks of shared BatchNorm compare; it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bn_det import DomainBatchNorm2d, forward_levels
from bn_det.layers import PerLevel

SIZES = [(80, 100), (40, 50), (20, 25), (10, 13), (5, 7)]
"""Height and width of p3 to p7."""

NUM_CONVS = 4


class Concatenated(nn.BatchNorm2d):
    """One BatchNorm of the levels put together, which are then taken apart again.

    They keep their memory format, as the next convolution needs them.
    """

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        areas = [x.shape[2] * x.shape[3] for x in xs]
        if xs[0].is_contiguous():
            joined = torch.cat([x.flatten(2) for x in xs], 2).unsqueeze(2)
            memory_format = torch.contiguous_format
        else:  # the same in the order of the memory: N, H, W, C
            joined = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in xs], 1)
            joined = joined.unsqueeze(1).permute(0, 3, 1, 2)
            memory_format = torch.channels_last
        parts = super().forward(joined).split(areas, 3)
        return [
            y.reshape(x.shape).contiguous(memory_format=memory_format)
            for x, y in zip(xs, parts, strict=True)
        ]


def joint(channels: int) -> nn.Module:
    return DomainBatchNorm2d(channels, len(SIZES), statistics="shared", population="shared")


def per_level(channels: int) -> nn.Module:
    return PerLevel(nn.BatchNorm2d(channels) for _ in SIZES)


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "joint": joint,
    "concat": Concatenated,
    "per_level": per_level,
}
"""From the number of channels to a layer that takes the list of levels; ours is the first."""


class Tower(nn.Module):
    """RetinaNet's tower with a norm that takes the list of levels."""

    def __init__(self, channels: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(NUM_CONVS)
        )
        self.norms = nn.ModuleList(make_norm(channels) for _ in range(NUM_CONVS))
        self.relu = nn.ReLU()

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            xs = forward_levels([conv], xs)
            if isinstance(norm, DomainBatchNorm2d):
                xs = forward_levels([norm, self.relu], xs)
            else:
                xs = [self.relu(y) for y in norm(xs)]
        return xs


class Pass:
    """A forward and backward pass of a layer or tower over levels; each call is one.

    Args:
        form: from a list of levels to one of the same shapes.
        xs: the levels, of any type.
        grads: the gradients of the outputs.
        autocast: the type that convolutions compute in, where it is not that of their weights.
    """

    def __init__(
        self,
        form: nn.Module,
        xs: Sequence[Tensor],
        grads: Sequence[Tensor],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.form, self.xs, self.grads, self.autocast = form, list(xs), list(grads), autocast

    def forward(self) -> list[Tensor]:
        if self.autocast is None:
            return self.form(self.xs)
        with torch.autocast(self.xs[0].device.type, self.autocast):
            return self.form(self.xs)

    def backward(self, ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of inputs, then of parameters."""
        return torch.autograd.grad(ys, [*self.xs, *self.form.parameters()], self.grads)

    def __call__(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        ys = self.forward()
        return ys, self.backward(ys)

    @property
    def least_bytes(self) -> int:
        """The fewest bytes that a normalization can move in a pass.

        Twice each input and once the output forward, twice each input and output gradient and once
        the input gradient backward.
        """
        return 8 * sum(x.nbytes for x in self.xs)


def make_levels(
    batch: int,
    channels: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random levels, and gradients of as many outputs of the same shapes."""
    torch.manual_seed(0)

    def make() -> list[Tensor]:
        return [
            torch.randn(batch, channels, h, w, device=device, dtype=dtype).to(
                memory_format=memory_format
            )
            for h, w in sizes
        ]

    return [x.requires_grad_() for x in make()], make()


def max_error(found: Pass, expected: Pass) -> float:
    """Largest difference of outputs and input gradients between two forms."""
    num = len(found.xs)
    (ys, grads), (other_ys, other_grads) = found(), expected()
    pairs = zip([*ys, *grads[:num]], [*other_ys, *other_grads[:num]], strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
