"""Normalizer-free backbones: the nets of timm, under the names of a ResNet's features."""

from __future__ import annotations

import itertools
import logging
import os
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from yacs.config import CfgNode

from ..errors import LOAD_ERRORS, InputError, check_rate, nearest, reason_of
from ..layers.state_dicts import why_unreadable

logger = logging.getLogger(__name__)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
"""The features of a normalizer-free net, in pixels of the image."""


class NFBackbone(nn.Module):
    """A normalizer-free net without its classifier.

    Brock et al., *Characterizing Signal Propagation to Close the Performance Gap in Unnormalized
    ResNets*, 2021a, and *High-Performance Large-Scale Image Recognition Without Normalization*,
    2021b. From images (N, 3, H, W) to a dict with ``res2`` to ``res5``, of STRIDES. The features
    are sums of branches: no activation follows, as one does in a ResNet. Weights have timm's names.

    Args:
        net: a ``timm.models.nfnet.NormFreeNet``.
        freeze_at: how many of stem and stages, from the first, are frozen: they need no gradient,
            and have no stochastic depth.

    Attributes:
        channels: of each feature.
    """

    def __init__(self, net: Any, freeze_at: int = 0) -> None:
        super().__init__()
        self.stem, self.stages, self.final_conv = net.stem, net.stages, net.final_conv
        # The first entry of timm's list is inside the stem.
        channels = [info["num_chs"] for info in net.feature_info[1:]]
        self.channels = dict(zip(STRIDES, channels, strict=True))
        parts = [[self.stem], *([s] for s in self.stages)]
        parts[-1].append(self.final_conv)
        for part in itertools.chain(*parts[:freeze_at]):
            part.requires_grad_(False)
            for block in part.children():
                if hasattr(block, "drop_path"):
                    block.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        features = {}
        for name, stage in zip(STRIDES, self.stages, strict=True):
            x = stage(x)
            features[name] = x
        features["res5"] = self.final_conv(x)
        return features


def build_nf(cfg: CfgNode, kind: type[NFBackbone] = NFBackbone) -> NFBackbone:
    """The net of MODEL.NF, frozen as MODEL.BACKBONE.FREEZE_AT says.

    Args:
        kind: a subclass that a host needs.

    Raises:
        InputError: the weights of MODEL.NF.PRETRAINED cannot be had, or are not this net's. For
            other values see :func:`check_nf`.
    """
    node = cfg.MODEL.NF
    return make_nf(
        node.NAME, node.PRETRAINED, node.DROP_PATH_RATE, cfg.MODEL.BACKBONE.FREEZE_AT, kind
    )


def make_nf(
    name: str,
    pretrained: str,
    drop_path_rate: float,
    freeze_at: int,
    kind: type[NFBackbone] = NFBackbone,
    key: str = "MODEL.NF.PRETRAINED",
) -> NFBackbone:
    """A normalizer-free net of timm.

    Args:
        name: timm's.
        pretrained: "timm" for the weights that timm has published, a file of the state dict of the
            whole net, or "" for random ones.
        drop_path_rate: of the last block; that of the others rises to it.
        freeze_at, kind: as in :class:`NFBackbone` and :func:`build_nf`.
        key: what errors call ``pretrained``.

    Raises:
        InputError: timm is not installed, or the weights cannot be had, or are not this net's.
    """
    timm = _timm()
    arguments = {"num_classes": 0, "drop_path_rate": drop_path_rate}
    try:
        net = timm.create_model(name, pretrained=pretrained == "timm", **arguments)
    except Exception as e:  # whatever a download raises: some of it is not even an OSError
        if pretrained != "timm":
            raise
        reason = reason_of(e)
        raise InputError(f"{key}: timm's weights of {name} cannot be had: {reason}") from e
    if pretrained not in ("", "timm"):
        _load(net, pretrained, name, key)
    return kind(net, freeze_at)


def check_nf(cfg: CfgNode) -> None:
    """Check the values of MODEL.NF before the net is built.

    Warn where images are not normalized as the net needs it.

    Raises:
        InputError: timm is not installed, it has no such net, or none without a norm, or no weights
            for it; there is no file of weights; or a rate is out of its bounds.
    """
    node = cfg.MODEL.NF
    check_rate("MODEL.NF.DROP_PATH_RATE", node.DROP_PATH_RATE)
    timm = _timm()
    published = timm.list_models(module="nfnet", pretrained=True)
    _check_name(timm, node.NAME, published)
    architecture = node.NAME.split(".")[0]
    if node.PRETRAINED == "timm":
        if architecture not in {name.split(".")[0] for name in published}:
            raise InputError(
                f"MODEL.NF.PRETRAINED: 'timm' is not accepted: timm has none for {node.NAME}, "
                f"but for {published}; use one of these, or '' or a file"
            )
    elif node.PRETRAINED and not os.path.isfile(node.PRETRAINED):
        raise InputError(
            f"MODEL.NF.PRETRAINED: there is no file {node.PRETRAINED}; use one, 'timm' or ''"
        )
    _check_pixels(cfg, timm.get_pretrained_cfg(node.NAME))


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as e:
        raise InputError(
            "MODEL.BACKBONE.NAME: normalizer-free backbones need timm, which is not installed; "
            "pip install 'bn_det[nf]'"
        ) from e
    return timm


def _check_name(timm: ModuleType, name: str, published: list[str]) -> None:
    nets = timm.list_models(module="nfnet")
    if name in nets or name in published:
        return
    if name not in timm.list_models():
        # Of the nets without a norm, and not of the thousand others.
        raise InputError(
            f"MODEL.NF.NAME: {name!r} is not accepted: timm has no model of that name; "
            f"{nearest(name, nets)}"
        )
    norm = first_norm(timm.create_model(name))
    reason = f"its {norm} is a norm" if norm else "it is none of timm's normalizer-free nets"
    raise InputError(f"MODEL.NF.NAME: {name!r} is not accepted: {reason}; use one of {nets}")


def first_norm(model: nn.Module) -> str:
    """Name and class of the first layer of a model that normalizes activations; "" without one."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)) or kind.endswith(
            ("Norm", "Norm2d")
        ):
            return f"{name} ({kind})"
    return ""


def _check_pixels(cfg: CfgNode, pretrained: Any) -> None:
    """Warn of images that are not normalized as a net's weights, or any such net, need it."""
    mean, std = ([255 * v for v in values] for values in (pretrained.mean, pretrained.std))
    model = cfg.MODEL
    if model.NF.PRETRAINED:
        pairs = zip((*mean, *std), (*model.PIXEL_MEAN, *model.PIXEL_STD), strict=True)
        if cfg.INPUT.FORMAT != "RGB" or any(abs(a - b) > 0.5 for a, b in pairs):
            logger.warning(
                "The weights of MODEL.NF.PRETRAINED %r expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN "
                "%s and MODEL.PIXEL_STD %s; the config has %s, %s and %s",
                *(model.NF.PRETRAINED, [round(v, 3) for v in mean], [round(v, 3) for v in std]),
                *(cfg.INPUT.FORMAT, list(model.PIXEL_MEAN), list(model.PIXEL_STD)),
            )
    elif min(model.PIXEL_STD) < 10:
        logger.warning(
            "MODEL.PIXEL_STD %s leaves pixels with a variance far from 1, and no norm of a "
            "normalizer-free net will change it; about %s is usual",
            *(list(model.PIXEL_STD), [round(v, 3) for v in std]),
        )


def _load(net: nn.Module, path: str, name: str, key: str) -> None:
    """Load a file of the whole net's weights. All have to fit but the classifier's, not needed."""
    from timm.models import load_state_dict

    failed = f"{key}: {path} cannot be loaded as the weights of {name}"
    try:
        state = load_state_dict(path, weights_only=True)
    except Exception as e:  # what loaders raise is of many kinds
        raise InputError(f"{failed}: {why_unreadable(path, e)}") from e
    try:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        missing, unexpected = net.load_state_dict(state, strict=False)
        reason = ""
        if missing or unexpected:
            reason = f"{len(missing)} weights are missing and {len(unexpected)} are none of its, "
            reason += f"such as {[*missing, *unexpected][0]}"
    except LOAD_ERRORS as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
    if reason:
        raise InputError(f"{failed}: {reason}")
