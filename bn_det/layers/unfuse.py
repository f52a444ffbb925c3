"""A convolution and its BatchNorm again, of a convolution that it has been folded into."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .domain_batch_norm import state_holders
from .fuse import Convolution, Fused, of_outputs, pairs, scale_and_shift, warn_of_training
from .kinds import STATE, check_module, eps_of, follows
from .levels import PerLevel
from .state_dicts import State, first_difference, read_weights
from .types import AnyBatchNorm


def unfuse(model: nn.Module, file: str | os.PathLike | State | None = None) -> nn.Module:
    """Have a convolution and its BatchNorm again where :func:`bn_det.fuse` has made one of them.

    In place, and the same function but for rounding. Without a file, of a model that has been fused
    in this process: each BatchNorm is the object that it was, with its statistics, and the weights
    of convolutions are as they were but for rounding (not where a channel's scale is 0). Mode,
    device, another dtype, and that nothing is to be learned are those of its convolution.

    With a file of a fused model's weights, which has no statistics any more: load it into a model
    that is not fused. Each BatchNorm is then folded (mean 0, variance 1; those of levels as they
    have to be), and :func:`bn_det.unfold` gives it real statistics.

    Args:
        model: fused, or with a file one that is not.
        file: a checkpoint that ``torch.load`` can read safely, with its weights under "model" or
            by themselves; or such a state dict.

    Returns:
        the model.

    Raises:
        InputError: there is nothing to undo, or the file does not belong to the model.
    """
    check_module("model", model)
    if file is not None:
        return _load(model, file)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and isinstance(getattr(child, "was", None), Fused)
    ]
    if isinstance(getattr(model, "was", None), Fused):
        places.append((nn.ModuleDict({"model": model}), "model", model))
    if not places:
        raise InputError("unfuse: no BatchNorm of this model has been fused by bn_det.fuse")
    for parent, name, fused in places:
        _restore(parent, name, fused)
    return model


@torch.no_grad()
def _restore(parent: nn.Module, name: str, fused: nn.Module) -> None:
    was: Fused = vars(fused)["was"]
    conv = cast(Convolution, fused[0] if isinstance(fused, PerLevel) else fused)
    setattr(parent, name, conv)
    was.norm.to(conv.weight.device)
    scale, shift = scale_and_shift(*state_holders(was.norm)[0], eps_of(was.norm))
    factor = torch.where(scale == 0, 1.0, 1 / scale)
    conv.weight.copy_(conv.weight.double() * of_outputs(conv, factor))
    if not was.had_bias:
        conv.bias = None
    elif conv.bias is not None:
        conv.bias.copy_((conv.bias.double() - shift) * factor)
    for key, hook in list(conv._forward_pre_hooks.items()):
        if hook is warn_of_training:
            del conv._forward_pre_hooks[key]
    for module in {conv, fused}:
        vars(module).pop("was", None)
    del vars(conv)["warned_of_training"]
    _follow(was, conv)
    setattr(conv if was.is_inside else parent, was.norm_name, was.norm)


def _follow(was: Fused, conv: Convolution) -> None:
    """Have a BatchNorm be what its convolution has become since it was in the model."""
    was.norm.train(conv.training)
    if conv.weight.dtype != was.dtype:
        was.norm.to(conv.weight.dtype)
    if was.learned and not conv.weight.requires_grad:
        was.norm.requires_grad_(False)


class _Pair(NamedTuple):
    """A convolution and its BatchNorm, and their names in the model."""

    conv: Convolution
    norm: AnyBatchNorm
    conv_name: str
    norm_name: str


def fused_layers(model: nn.Module, weights: Container[str]) -> list[str]:
    """The BatchNorm layers of a model that a file has inside the convolutions before them.

    Args:
        weights: the names of the weights in the file.
    """
    return [pair.norm_name for pair in _fused_pairs(model, weights)]


def _fused_pairs(model: nn.Module, weights: Container[str]) -> list[_Pair]:
    names = {module: name for name, module in model.named_modules()}
    every = [_Pair(of.conv, of.norm, names[of.conv], names[of.norm]) for of in pairs(model)]
    return [
        pair
        for pair in every
        if not any(_join(pair.norm_name, key) in weights for key in _own_keys(pair.norm))
        and any(_join(pair.conv_name, key) in weights for key in ("bias", "0.bias"))
    ]


def _own_keys(norm: nn.Module) -> list[str]:
    """The keys of a BatchNorm, without those of what follows it, which stays in a fused model."""
    names = [] if (rest := follows(norm)) is None else list(rest._modules)
    return [key for key in norm.state_dict() if key.partition(".")[0] not in names]


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _load(model: nn.Module, file: str | os.PathLike | State) -> nn.Module:
    state = dict(file) if isinstance(file, Mapping) else read_weights(file)
    fused = _fused_pairs(model, state)
    if not fused:
        raise InputError(
            "unfuse: the weights are not those of a fused model of this kind: none of its "
            "BatchNorm layers is inside a convolution there"
        )
    for pair in fused:
        _unfuse_state(state, pair)
    if different := first_difference(model.state_dict(), state):  # before anything is loaded
        name, own, other = different
        raise InputError(
            f"unfuse: the weights do not fit the model: {name} is {other} in them and {own} in the "
            "model"
        )
    model.load_state_dict(state)
    return model


@torch.no_grad()
def _unfuse_state(state: dict[str, Tensor], pair: _Pair) -> None:
    """Put into a state dict what a pair has, for what its convolution alone has there."""
    name, holders, eps = pair.conv_name, state_holders(pair.norm), eps_of(pair.norm)
    is_one = _join(name, "weight") in state
    levels = [name] if is_one else [_join(name, str(k)) for k in range(len(holders))]
    try:
        weights = [state.pop(_join(level, "weight")).double() for level in levels]
        biases = [state.pop(_join(level, "bias")).double() for level in levels]
    except KeyError as e:
        raise InputError(f"unfuse: the weights of {name} have no {e.args[0]}") from e
    scales, state[_join(name, "weight")] = _common_weight(pair, weights)
    if pair.conv.bias is not None:
        state[_join(name, "bias")] = torch.zeros_like(biases[0])
    places = {m: _join(pair.norm_name, n) for n, m in pair.norm.named_modules()}
    uses = Counter(affine for _, affine in holders)
    for k, (population, affine) in enumerate(holders):
        scale, shift = scales[0 if is_one else k], biases[0 if is_one else k]
        if affine.weight is not None and uses[affine] == 1:  # folded into its affine
            ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
            of_affine = scale * (1 + eps) ** 0.5, shift
            statistics = zeros, ones
        else:
            of_affine = torch.ones_like(scale), torch.zeros_like(scale)
            statistics = -shift / scale, scale.square().reciprocal() - eps
        _put(state, places[affine], affine, dict(zip(STATE[2:], of_affine, strict=True)))
        _put(state, places[population], population, dict(zip(STATE[:2], statistics, strict=True)))


def _put(
    state: dict[str, Tensor], place: str, holder: nn.Module, values: dict[str, Tensor]
) -> None:
    """A layer's values, of those that it has; no batch has been tracked."""
    for name, value in values.items():
        if getattr(holder, name) is not None:
            state[f"{place}.{name}"] = value
    counter = getattr(holder, "num_batches_tracked", None)
    if "running_mean" in values and counter is not None:
        state[f"{place}.num_batches_tracked"] = torch.zeros_like(counter)


def _common_weight(pair: _Pair, weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Weights of levels as a scale for each output channel times one weight that they share.

    The largest scale is 1, as a variance of 1 / scale^2 - eps has to be positive.
    """
    out_dim = 1 if isinstance(pair.conv, nn.ConvTranspose2d) else 0
    rows = torch.stack([w.transpose(0, out_dim).flatten(1) for w in weights])
    largest = rows.norm(dim=2).argmax(0)
    common = rows[largest, torch.arange(rows.shape[1])]
    square = common.square().sum(1)
    scales = torch.where(square > 0, (rows * common).sum(2) / square, 1.0)
    if (rows - scales.unsqueeze(2) * common).abs().max() > 1e-3 * common.abs().max():
        raise InputError(
            f"unfuse: the weights of {pair.conv_name} for its levels are not multiples of each "
            "other, as those that a BatchNorm has been folded into are"
        )
    shape = weights[0].transpose(0, out_dim).shape
    return list(scales), common.view(shape).transpose(0, out_dim).contiguous()
