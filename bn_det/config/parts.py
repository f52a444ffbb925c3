"""The parts of a detector that have a norm, and the norm of each by a config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

from torch import nn
from yacs.config import CfgNode

from ..layers import (
    BATCH_NORMS,
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
    norm_factory,
)
from ..layers.norms import NormFactory

logger = logging.getLogger(__name__)

LEVEL_PARTS = ("RETINANET", "BN_FCOS", "RPN")
"""The nodes of MODEL that stand for a head on all levels of a pyramid."""

SOURCE_PARTS = ("RESNETS", "FPN", *LEVEL_PARTS)
"""Those that are called with images, not RoIs, and so can tell the sources of images apart."""

ROI_PARTS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
"""Those that are called with RoIs."""

PARTS = (*SOURCE_PARTS, *ROI_PARTS)
"""The nodes of MODEL that have a NORM."""

MATCHERS = ("RETINANET", "RPN", "ROI_HEADS")
"""The parts that match anchors or boxes with objects by their overlap."""

RCNNS = ("GeneralizedRCNN", "BNGeneralizedRCNN")
"""Detectron2's, and ours, which tells its layers the sources of images."""

DENSE = {"BNRetinaNet": "RETINANET", "BNFCOS": "BN_FCOS"}
"""Our meta-architectures without RPN and RoI heads, and their heads' nodes."""


def part_norm(
    cfg: CfgNode, part: str, others: Mapping[str, NormFactory], num_levels: int | None = None
) -> NormFactory | None:
    """The norm that a part of the model asks for by its NORM; see ``norm_factory``.

    Args:
        part: one of PARTS.
        others: the host's layers that have no choice of batch, by name.
        num_levels: where the part has BN: a layer for a list of so many levels, as that says; for
            RoIs of so many levels where the part is a RoI head.
    """
    node, limits = cfg.MODEL[part], cfg.SOLVER.BRN
    if node.NORM and node.get("NUM_CONV") == 0 and part in ROI_PARTS:
        logger.warning(
            "MODEL.%s.NORM: %r does nothing with MODEL.%s.NUM_CONV 0; it is that of the head's "
            "convolutions: use 1 or more of them",
            *(part, node.NORM, part),
        )
    if num_levels is not None and part in LEVEL_PARTS:
        # One for all levels would keep one EMA of what each normalizes by itself.
        others = {**others, "L1BN": partial(L1BatchNorm2d.of_levels, num_levels=num_levels)}
    return norm_factory(
        node.NORM,
        _layer(cfg, part, num_levels),
        others,
        f"MODEL.{part}.NORM",
        ghost_key=f"MODEL.{part}.GHOST_SIZE",
        ghost_size=node.GHOST_SIZE,
        ghost_order=node.GHOST_ORDER,
        renorm=(limits.R_MAX, limits.D_MAX),
    )


def _layer(cfg: CfgNode, part: str, num_levels: int | None) -> Callable[..., nn.Module]:
    """The kind of BatchNorm that a part has, whichever of BATCH_NORMS it is."""
    choices: dict[str, Any] = {
        "eval_statistics": _statistics(cfg.TEST, part, "population"),
        "train_statistics": _statistics(cfg.SOLVER, part, "batch"),
        "update_population": cfg.SOLVER.UPDATE_POPULATION,
        "momentum": cfg.SOLVER.BN_MOMENTUM,
    }
    # Parts that are never given a number of levels have no keys for them.
    are_told = num_levels is not None and (part in LEVEL_PARTS or is_per_level(cfg, part))
    levels = num_levels if are_told else None
    if levels is not None:
        choices |= {key.lower(): value for key, value in cfg.MODEL[part].BN.items()}
    if part in cfg.MODEL.BN_SOURCES.PARTS:
        choices.setdefault("affine", cfg.MODEL.BN_SOURCES.AFFINE)
        choices |= {"num_sources": len(cfg.DATASETS.SOURCES), "num_levels": num_levels}
        return partial(SourceBatchNorm2d, **choices)
    if levels is not None:
        kind = DomainBatchNorm2d if part in LEVEL_PARTS else RoILevelBatchNorm2d
        return partial(kind, num_domains=levels, **choices)
    return partial(BatchNorm2d, **choices)


def convert_resnet(cfg: CfgNode, resnet: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """A stock ResNet with our layers (``convert_batchnorm``), and the momentum of the config."""
    resnet = convert_batchnorm(resnet, make)
    for module in resnet.modules():
        if isinstance(module, BatchNorm2d):
            module.momentum = cfg.SOLVER.BN_MOMENTUM
    return resnet


def is_per_level(cfg: CfgNode, part: str) -> bool:
    """Whether anything is per level in the BN of a part."""
    return "per_domain" in cfg.MODEL[part].BN.values()


def _statistics(node: CfgNode, part: str, default: str) -> str:
    """What normalizes a part, by the BN_STATISTICS of TEST or SOLVER."""
    return node.BN_STATISTICS if part in (node.BN_STATISTICS_PARTS or PARTS) else default


def shuffle_of(cfg: CfgNode, part: str) -> bool:
    """Whether training is to shuffle the RoIs of a head, as its SHUFFLE says.

    Where its NORM has no batch, shuffling would change nothing: a warning says so, and the answer
    is no.

    Args:
        part: one of ROI_PARTS.
    """
    node = cfg.MODEL[part]
    if node.SHUFFLE and node.NORM not in BATCH_NORMS:
        logger.warning(
            "MODEL.%s.SHUFFLE: True does nothing with MODEL.%s.NORM %r, which has no batch; it "
            "is of use with %s",
            *(part, part, node.NORM, ", ".join(BATCH_NORMS)),
        )
        return False
    return node.SHUFFLE


_BACKBONES = (
    "build_bn_resnet_fpn_backbone",
    "build_bn_retinanet_resnet_fpn_backbone",
    "build_bn_fcos_resnet_fpn_backbone",
)
NF_BACKBONES = ("build_nf_resnet_fpn_backbone", "build_nf_retinanet_resnet_fpn_backbone")
"""Those with a normalizer-free net in place of a ResNet."""

COMPONENTS = {
    "RESNETS": ("BACKBONE.NAME", _BACKBONES),
    "FPN": ("BACKBONE.NAME", (*_BACKBONES, *NF_BACKBONES)),
    "RETINANET": ("META_ARCHITECTURE", ("BNRetinaNet",)),
    "BN_FCOS": ("META_ARCHITECTURE", ("BNFCOS",)),
    "RPN": ("RPN.HEAD_NAME", ("BNRPNHead",)),
    "ROI_BOX_HEAD": ("ROI_BOX_HEAD.NAME", ("BNFastRCNNConvFCHead",)),
    "ROI_MASK_HEAD": ("ROI_MASK_HEAD.NAME", ("BNMaskRCNNConvUpsampleHead",)),
}
"""For each part the key below MODEL that says what builds it, and our components."""


def has_our_batch_norm(cfg: CfgNode, part: str) -> bool:
    """Whether a part of the model, one of PARTS, is built with one of BATCH_NORMS by us."""
    return not why_not_ours(cfg, part) and cfg.MODEL[part].NORM in BATCH_NORMS


_DENSE = {"RETINANET": ("RetinaNet", "BNRetinaNet"), "BN_FCOS": ("FCOS", "BNFCOS")}
"""The meta-architectures that a head of a dense detector is a part of, Detectron2's and ours."""

_KNOWN = (*(name for names in _DENSE.values() for name in names), *RCNNS)


def is_built(cfg: CfgNode, part: str) -> bool:
    """Whether the detector has the part, whoever builds it."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if part in _DENSE:
        return architecture in _DENSE[part]
    is_dense = any(architecture in names for names in _DENSE.values())
    return part in ("RESNETS", "FPN") or not is_dense


def why_not_built(cfg: CfgNode, part: str) -> str:
    """Which key says that the detector does not have the part, if so.

    Of architectures of other projects nothing is known.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _KNOWN and not is_built(cfg, part):
        return f"MODEL.META_ARCHITECTURE {architecture!r}, which does not have this part"
    return ""


def why_not_ours(cfg: CfgNode, part: str) -> str:
    """Which key says that a part of the model is not built by us, if so; and what would do."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if part in ("RPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD") and architecture in DENSE:
        return f"MODEL.META_ARCHITECTURE {architecture!r}, which has neither RPN nor RoI heads"
    key, names = COMPONENTS[part]
    value = attrgetter(key)(cfg.MODEL)
    return "" if value in names else f"MODEL.{key} {value!r}; use one of {list(names)}"
