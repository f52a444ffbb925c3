"""Normalized weights, in place of or beside normalized activations.

The weight of a layer that is already built becomes a function of the parameter that is trained
(``torch.nn.utils.parametrize``); the layer stays the same object, which whoever holds it goes on
using.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..errors import InputError, choose, of_other_type
from .kinds import check_module

WEIGHT_NORMS = ("WS", "ScaledWS", "WN")
"""The names of the kinds; see :func:`normalize_weight`."""

GAMMA_RELU = math.sqrt(2 / (1 - 1 / math.pi))
"""1 / the standard deviation of ReLU(x), x from N(0, 1) (Brock et al. 2021a, Sec. 4.3)."""

_KEYS = {
    "WS": {"original": "weight"},
    "ScaledWS": {"original": "weight", "0.gain": "gain"},
    "WN": {"original1": "weight", "original0": "weight_g"},
}
"""What the tensors in ``parametrizations.weight`` are called in a state dict."""

_WHERE = "parametrizations.weight."

Weighted = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
"""Layers whose weight can be normalized."""


class WeightStandardization(nn.Module):
    """From a weight to ``(W - mean) / sqrt(var + eps)``, of each output unit.

    Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization*, 2019, Eq. 6; timm's ``StdConv2d``. Half weights are standardized in float32.

    Args:
        unit_dim: of the weight; 1 for a transposed convolution.
    """

    def __init__(self, unit_dim: int = 0, eps: float = 1e-6) -> None:
        super().__init__()
        self.unit_dim, self.eps = unit_dim, eps

    def forward(self, weight: Tensor) -> Tensor:
        return self._standardized(weight, None)

    def _standardized(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        units = weight.transpose(0, self.unit_dim)
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = units.to(wide).reshape(1, units.shape[0], -1)
        # The one fused kernel that standardizes rows, and its gradient.
        rows = F.batch_norm(rows, None, None, weight=scale, training=True, eps=self.eps)
        return rows.view(units.shape).transpose(0, self.unit_dim).to(weight.dtype)


class ScaledWeightStandardization(WeightStandardization):
    """From a weight to ``gain * gamma * (W - mean) / sqrt(fan_in * (var + eps))``.

    With it the variance of a layer's output is that of the input of the nonlinearity before it:
    Brock et al., *Characterizing Signal Propagation to Close the Performance Gap in Unnormalized
    ResNets*, 2021a, Eq. 1; *High-Performance Large-Scale Image Recognition Without Normalization*,
    2021b, Sec. 3. As in timm's ``ScaledStdConv2d`` eps is added to the variance, where the paper's
    code takes the larger of it and fan_in * var.

    Args:
        weight: the first one, of which shape, type and device are taken.
        gamma: 1 / the standard deviation of the nonlinearity before the layer.
        fan_in: number of inputs of each output value.
    """

    def __init__(
        self, weight: Tensor, gamma: float, fan_in: float, unit_dim: int = 0, eps: float = 1e-6
    ) -> None:
        super().__init__(unit_dim, eps)
        self.scale = gamma * fan_in**-0.5
        shape = [1] * weight.dim()
        shape[unit_dim] = weight.shape[unit_dim]
        self.gain = nn.Parameter(weight.new_ones(shape, requires_grad=True))

    def forward(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self._standardized(weight, self.gain.to(wide).flatten() * self.scale)


def normalize_weight(layer: Weighted, kind: str, gamma: float = 1.0) -> None:
    """Normalize the weight of a convolution or fully connected layer, in place.

    The parameter that was ``weight`` stays the one that is trained. In state dicts it is still
    ``weight``, beside ``gain`` (ScaledWS; the names of timm's ``ScaledStdConv2d``) or ``weight_g``
    (WN), so that weights load by name from checkpoints without weight normalization, too.

    Args:
        layer: ``nn.Linear``, ``nn.Conv2d`` or ``nn.ConvTranspose2d``, or a subclass.
        kind: "WS", :class:`WeightStandardization`; "ScaledWS",
            :class:`ScaledWeightStandardization`; or "WN", torch's ``weight_norm`` (Salimans &
            Kingma 2016), which computes the same as before at first.
        gamma: for "ScaledWS": GAMMA_RELU after a ReLU, 1 after what is linear.

    Raises:
        InputError: the kind is unknown; the layer is none of those, has been normalized, is
            transposed and has groups, or has a single weight for each output unit.
    """
    choose("kind", kind, WEIGHT_NORMS)
    if not isinstance(layer, Weighted):
        raise of_other_type("layer", layer, "a layer of Linear, Conv2d or ConvTranspose2d")
    if parametrize.is_parametrized(layer):
        raise InputError(f"{kind}: {layer} is parametrized already")
    unit_dim, num_places = 0, 1
    if isinstance(layer, nn.ConvTranspose2d):
        if layer.groups > 1:
            raise InputError(
                f"{kind}: {layer} is transposed and has groups, which is not supported"
            )
        # An output of a transposed convolution meets one weight in stride x stride.
        unit_dim, num_places = 1, math.prod(layer.stride)
    per_unit = layer.weight.numel() // layer.weight.shape[unit_dim]
    if kind == "WN":
        parametrizations.weight_norm(layer, dim=unit_dim)
    else:
        if per_unit < 2:
            raise InputError(f"{kind}: {layer} has a single weight for each output unit")
        function = WeightStandardization(unit_dim)
        if kind == "ScaledWS":
            fan_in = per_unit / num_places
            function = ScaledWeightStandardization(layer.weight, gamma, fan_in, unit_dim)
        parametrize.register_parametrization(layer, "weight", function)
    vars(layer)["weight_norm"] = kind
    # As torch's own parametrizations do. Methods of the layer would not survive deepcopy.
    layer._register_state_dict_hook(_rename_saved)
    layer._register_load_state_dict_pre_hook(_rename_loaded, with_module=True)
    layer.register_load_state_dict_post_hook(_rename_missing)


def normalize_convolutions(module: nn.Module, kind: str) -> None:
    """Normalize the weights of all convolutions of a module that are trained; "" for none."""
    for layer in list(module.modules()) if kind else []:
        if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad:
            normalize_weight(layer, kind)


def normalize_tower(layers: Iterable[Weighted], kind: str) -> None:
    """Normalize the weights of a head's hidden layers, each of which a ReLU follows.

    The first gets features of a pyramid, which are linear.

    Args:
        layers: convolutions and fully connected layers in the order of application.
        kind: as for ``normalize_weight``, or "" for none. "WS" leaves the scale of outputs to a
            norm: it is for the convolutions, and leaves alone a transposed convolution and fully
            connected layers, which have none.
    """
    for k, layer in enumerate(layers if kind else []):
        if kind != "WS" or isinstance(layer, nn.Conv2d):
            normalize_weight(layer, kind, GAMMA_RELU if k else 1.0)


def normalize_pyramid(
    laterals: Iterable[Weighted],
    outputs: Iterable[Weighted],
    top_block: nn.Module | None,
    kind: str,
    after_relu: bool,
) -> None:
    """Normalize the weights of a feature pyramid's convolutions.

    Args:
        laterals, outputs: its 1x1 and 3x3 convolutions.
        top_block: what makes the levels above; with ``p6`` and ``p7`` these are convolutions, on
            the backbone's last feature and on ReLU(p6).
        kind: as for ``normalize_weight``, or "" for none. "WS" leaves the scale of outputs to a
            norm, and so leaves alone p6 and p7, which have none.
        after_relu: whether the backbone's features are outputs of a ReLU.
    """
    gamma = GAMMA_RELU if after_relu else 1.0
    layers: list[tuple[Weighted, float]]
    layers = [*((conv, gamma) for conv in laterals), *((conv, 1.0) for conv in outputs)]
    above = {"p6": gamma, "p7": GAMMA_RELU} if kind != "WS" else {}
    layers += [(getattr(top_block, n), g) for n, g in above.items() if hasattr(top_block, n)]
    for layer, its_gamma in layers if kind else []:
        normalize_weight(layer, kind, its_gamma)


def bake_weight_norms(model: nn.Module) -> nn.Module:
    """Have the layers of a model hold their normalized weights as they are now, in place.

    For inference: it saves the normalization, and lets ``bn_det.fuse`` fold a BatchNorm into such a
    layer. Unlike torch's ``remove_parametrizations`` it leaves copies of the model intact.

    Returns:
        The model.
    """
    check_module("model", model)
    for layer in model.modules():
        if isinstance(layer, Weighted) and hasattr(layer, "weight_norm"):
            original = next(layer.get_submodule("parametrizations.weight").parameters())
            weight = nn.Parameter(layer.weight.detach(), original.requires_grad)
            del layer.weight_norm
            _without_parametrized_weight(layer)
            layer.weight = weight
    return model


def _without_parametrized_weight(layer: nn.Module) -> None:
    """Copies of a layer have its class, which stays as it is."""
    cls, parametrizations = type(layer), layer.get_submodule("parametrizations")
    if len(list(parametrizations.children())) == 1:
        del layer.parametrizations
        layer.__class__ = cls.__bases__[0]
    else:  # of bias
        delattr(parametrizations, "weight")
        others = {name: of for name, of in vars(cls).items() if name != "weight"}
        layer.__class__ = type(cls.__name__, cls.__bases__, others)


def _rename_saved(
    layer: nn.Module, state: MutableMapping[str, Tensor], prefix: str, _: dict[str, Any]
) -> None:
    for own, key in _KEYS.get(getattr(layer, "weight_norm", ""), {}).items():
        state[prefix + key] = state.pop(f"{prefix}{_WHERE}{own}")


def _rename_loaded(
    layer: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any
) -> None:
    kind = getattr(layer, "weight_norm", "")
    weight = state.get(f"{prefix}weight")
    if kind == "WN" and weight is not None and f"{prefix}weight_g" not in state:
        # A checkpoint without weight normalization: the same weight.
        dim: int = vars(layer.get_submodule("parametrizations.weight.0"))["dim"]
        state[f"{prefix}weight_g"] = torch.norm_except_dim(weight, 2, dim)
    for own, key in _KEYS.get(kind, {}).items():
        if prefix + key in state:
            state[f"{prefix}{_WHERE}{own}"] = state.pop(prefix + key)


def _rename_missing(layer: nn.Module, incompatible: Any) -> None:
    """Name missing keys as a state dict does."""
    for own, key in _KEYS.get(getattr(layer, "weight_norm", ""), {}).items():
        for k, name in enumerate(incompatible.missing_keys):
            if name.endswith(_WHERE + own):
                incompatible.missing_keys[k] = name.removesuffix(_WHERE + own) + key
