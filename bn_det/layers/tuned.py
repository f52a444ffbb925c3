"""Convolutions and frozen BatchNorm layers that compute as one, with all that each of them has.

The convolution hands its input on, and the BatchNorm convolves with a weight in which its scale is.
Where that is not right, or not worth it, both compute what they always do; each call decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .become import class_of, with_class
from .domain_batch_norm import DomainBatchNorm2d, holders_of_domains, state_holders
from .freeze import is_frozen
from .held import constant, with_zero_gradients
from .kernels import normalize_one
from .kinds import eps_of, follows, is_host_frozen
from .mixed import MixedIn, mixed
from .types import Affine, AnyBatchNorm, Statistics, has_statistics
from .watched import is_watched


class Deferred(NamedTuple):
    """What a convolution returns where the BatchNorm after it convolves: no tensor.

    Whatever else gets it fails, and does not compute with it.
    """

    conv: TunedConv
    x: Tensor


class _Tuned(MixedIn):
    """Mixed into the class of a convolution or of a BatchNorm.

    Attributes:
        tuned_type: the class that it had.
    """

    made_name, made_from = "Tuned{}", "tuned_type"
    tuned_type: type[nn.Module]


class TunedConv(_Tuned, _ConvNd):
    """A convolution that the BatchNorm in ``followed_by`` gets the output of.

    Attributes:
        followed_by: that one; in a tuple, which torch does not take for a child.
    """

    followed_by: tuple[AnyBatchNorm]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | Deferred:
        if args or kwargs or not folds(self, self.followed_by[0], x):
            return super().forward(x, *args, **kwargs)
        return Deferred(self, x)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What it computes with another weight and bias."""
        return _beside(self, weight, bias).compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """By what it has itself."""
        return super().forward(x)


class TunedConvWithNorm(_Tuned, nn.Conv2d):
    """A convolution that calls its BatchNorm itself, ``norm``."""

    norm: TunedNorm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not folds(self, norm, x):
            return super().forward(x)
        holders = state_holders(norm)[0]
        weight, bias = _folded(self, *holders, eps_of(norm))
        return _beside(self, weight, bias).with_norm(norm.rest(), x)

    def with_norm(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """By what it has itself, with something else in place of the BatchNorm."""
        vars(self)["norm"] = norm
        return super().forward(x)


class TunedConvWithNormOfLevels(TunedConv, nn.Conv2d):
    """A convolution with a BatchNorm for lists in it.

    ``forward_levels`` calls nn.Conv2d's forward method of it, and then its ``norm``.
    """

    norm: AnyBatchNorm

    def forward(self, x: Tensor) -> Any:
        return self.tuned_type.forward(self, x)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return Deferred(self, x) if folds(self, self.norm, x) else self.convolve(x, weight, bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight, bias)


class TunedNorm(_Tuned):
    """A frozen BatchNorm that convolves where the convolution before it has not."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Deferred):
            holders = state_holders(self)[0]
            y, rest = x.conv.convolve(x.x, *_folded(x.conv, *holders, eps_of(self))), self.rest()
            return y if rest is None else rest(y)
        if isinstance(x, (list, tuple)) and any(isinstance(of, Deferred) for of in x):
            return self._levels(x)
        return super().forward(x, *args, **kwargs)

    def rest(self) -> nn.Module | None:
        """What the layer does after it normalizes."""
        return None

    def _levels(self, xs: Sequence[Tensor | Deferred]) -> list[Tensor]:
        """Each level with the weight of its own, which is derived once where levels share it."""
        derived: dict[tuple[nn.Module, nn.Module], tuple[Tensor, Tensor]] = {}
        ys = []
        for x, holders in zip(xs, holders_of_domains(self), strict=True):
            if isinstance(x, Deferred):
                if holders not in derived:
                    derived[holders] = _folded(x.conv, *holders, eps_of(self))
                ys.append(x.conv.convolve(x.x, *derived[holders]))
            else:
                population, affine = holders
                state = population.running_mean, population.running_var, affine.weight, affine.bias
                ys.append(normalize_one(x, *state, eps_of(self)))
        return ys


class TunedNormAndMore(TunedNorm):
    """One that calls its children after it normalizes: timm's, which have an activation."""

    def rest(self) -> nn.Module:
        return nn.Sequential(*self.children())


class TunedHostNorm(TunedNorm):
    """A host's FrozenBatchNorm2d, which by itself would return other types in mixed precision.

    torchvision's returns float32 there, and takes three passes where one does.
    """

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Deferred):
            return super().forward(x)
        state = self.running_mean, self.running_var, self.weight, self.bias
        return normalize_one(x, *state, eps_of(self))


def untune(model: nn.Module) -> None:
    """Have each convolution and each BatchNorm of a model compute by itself."""
    for module in model.modules():
        if isinstance(module, _Tuned):
            vars(module).pop("followed_by", None)
            with_class(module, module.tuned_type)


def folds(conv: _ConvNd, norm: nn.Module, x: Tensor) -> bool:
    """Whether a convolution and its BatchNorm are to be one in a call.

    Not where somebody looks at what is between them, nor where the output is smaller than the
    weight: of the two, the smaller one is scaled.
    """
    are_as_tuned = (
        isinstance(norm, TunedNorm)
        and is_frozen(norm)
        # Not what a parametrization makes, nor a replica's of DataParallel.
        and isinstance(conv._parameters.get("weight"), Tensor)
        # Observers are those of a BatchNorm of ours.
        and not (is_watched(conv) or is_watched(norm) or getattr(norm, "_observers", None))
    )
    return are_as_tuned and x.dim() == 4 and _num_outputs(conv, x) >= conv.weight.numel()


def _num_outputs(conv: _ConvNd, x: Tensor) -> int:
    """About as many values as a convolution puts out."""
    inputs, stride = x.shape[0] * x.shape[2] * x.shape[3], math.prod(conv.stride)
    positions = inputs * stride if conv.transposed else inputs // stride
    return positions * conv.out_channels


def _folded(
    conv: _ConvNd, population: Statistics, affine: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with a BatchNorm in them, differentiable in what learns.

    In float32 at least, and then of the weight's type; autocast casts what a convolution gets.
    """
    assert has_statistics(population)  # as all that is frozen
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, var = population.running_mean.to(dtype), population.running_var.to(dtype)
    weight, bias = constant(affine.weight), constant(affine.bias)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean if conv.bias is None else conv.bias - mean
    shift = shift * scale if bias is None else torch.addcmul(bias.to(dtype), shift, scale)
    shape = [1] * conv.weight.dim()
    shape[1 if conv.transposed else 0] = -1
    derived = (conv.weight * scale.view(shape)).to(conv.weight.dtype)
    derived = with_zero_gradients(derived, affine.weight, affine.bias)
    return derived, shift.to(conv.weight.dtype)


def _beside(conv: nn.Module, weight: Tensor, bias: Tensor) -> Any:
    """A convolution of the same class and attributes with another weight and bias.

    The convolution itself stays as it is at each moment, as other threads may call it.
    """
    other = object.__new__(type(conv))
    vars(other).update(vars(conv))
    # In front of parameters and children of these names, which both have.
    vars(other).update(weight=weight, bias=bias)
    return other


def tune_pair(conv: _ConvNd, norm: AnyBatchNorm) -> None:
    """Have a convolution and the frozen BatchNorm that gets its output compute as one."""
    is_inside = conv._modules.get("norm") is norm
    takes_list = isinstance(norm, DomainBatchNorm2d) and norm.takes_list
    kind: type[_Tuned] = TunedConvWithNormOfLevels if takes_list else TunedConvWithNorm
    if not is_inside:
        kind, vars(conv)["followed_by"] = TunedConv, (norm,)
    with_class(conv, mixed(kind, type(conv)))
    of_norm = TunedHostNorm if is_host_frozen(norm) else TunedNorm
    of_norm = of_norm if follows(norm) is None else TunedNormAndMore
    with_class(norm, mixed(of_norm, class_of(norm)))
