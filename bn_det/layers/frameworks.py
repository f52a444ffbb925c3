"""BatchNorm's numbers between frameworks that store them otherwise; see docs/frameworks.md."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def from_caffe(mean: Tensor, var: Tensor, scale_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Population statistics of the three blobs of Caffe's BatchNorm layer.

    Caffe adds statistics up without dividing: its third blob is what to divide by, and 0 in a layer
    that has not been trained. Weight and bias are in the Scale layer that follows.

    Args:
        mean, var: the first two blobs, shape (C,).
        scale_factor: the third, one number.

    Returns:
        mean and (unbiased) variance, shape (C,).
    """
    factor = scale_factor.flatten()[0]
    factor = factor.reciprocal() if factor != 0 else factor
    return mean * factor, var * factor


def var_from_inverse_std(inverse_std: Tensor, eps: float) -> Tensor:
    """The variance of what is stored as 1 / sqrt(var + eps).

    Raises:
        InputError: a value is not positive, or eps is not what it was stored with.
    """
    if not (inverse_std > 0).all():
        raise InputError("inverse_std: values of 0 or less are not accepted; it is 1 / sqrt(var)")
    return _var(inverse_std.double() ** -2 - eps, eps).to(inverse_std.dtype)


def with_eps(var: Tensor, eps: float, new_eps: float) -> Tensor:
    """The variance with which a layer of another eps computes the same.

    Keras and TensorFlow have 1e-3, torch 1e-5; Detectron2's FrozenBatchNorm2d is built with 1e-5,
    and a checkpoint does not say.

    Raises:
        InputError: some variance is too small for the new eps.
    """
    return _var(var + (eps - new_eps), new_eps)


def with_statistics(
    weight: Tensor,
    bias: Tensor,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight and bias with which a layer computes the same by other population statistics.

    For a checkpoint whose statistics have been folded into the affine (mean 0, variance 1): with
    those that ``update_bn_stats`` finds, and this affine, it is the same function at test time, and
    a BatchNorm again, which can be trained.

    Args:
        weight, bias: shape (C,).
        old, new: mean and variance, shape (C,).
    """
    scale = weight * (old[1] + eps).rsqrt()
    return scale * (new[1] + eps).sqrt(), bias + scale * (new[0] - old[0])


def _var(var: Tensor, eps: float) -> Tensor:
    # Up to rounding: a channel that is always 0 has variance 0.
    if not (var >= -1e-3 * eps).all():
        smallest = torch.min(var).item()
        raise InputError(f"eps: {eps!r} is not accepted: it would leave a variance of {smallest}")
    return var.clamp(min=0)
