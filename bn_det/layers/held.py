"""Parameters that are frozen while something waits for their gradients."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn


class HeldParameter(nn.Parameter):
    """What a frozen parameter is by class whose gradient a DistributedDataParallel waits for.

    The gradient is zero, so that no norm of gradients counts it, and optimizers are kept from
    moving it all the same, as momentum and weight decay would. A copy is in none, and needs no
    gradient.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        data = self.data.clone(memory_format=torch.preserve_format)
        memo[id(self)] = copy = nn.Parameter(data, requires_grad=False)
        return copy

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return nn.Parameter, (self.data, False)


def constant(parameter: Tensor | None) -> Tensor | None:
    """A parameter for a computation that is to find no gradient of it where it is held."""
    return parameter.detach() if type(parameter) is HeldParameter else parameter


def with_zero_gradients(y: Tensor, *parameters: Tensor | None) -> Tensor:
    """y, whose backward pass gives those of the parameters that are held the zeros they wait for.

    So that nothing is held or computed for a gradient that is thrown away.
    """
    held = [parameter for parameter in parameters if type(parameter) is HeldParameter]
    return _ZeroGradients.apply(y, *held) if held else y


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.like]
        return (dy, *zeros)
