"""Checks of a config's values, before anything is built."""

from __future__ import annotations

import logging
from operator import attrgetter

import torch
from yacs.config import CfgNode

from ..errors import InputError, choose
from ..layers import BATCH_NORMS
from .nf import check_nf
from .parts import (
    COMPONENTS,
    DENSE,
    MATCHERS,
    NF_BACKBONES,
    PARTS,
    has_our_batch_norm,
    is_built,
    is_per_level,
    why_not_ours,
)
from .ranges import check_ranges

logger = logging.getLogger(__name__)

DEPTHS = (18, 34, 50, 101, 152)
"""Of ResNets, on both hosts."""


def check_values(cfg: CfgNode) -> None:
    """Raise InputError for values that are not accepted, or not together."""
    check_ranges(cfg)
    if "resnet" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.BACKBONE.NAME not in NF_BACKBONES:
        choose("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, DEPTHS)
        if cfg.MODEL.RESNETS.DEPTH < 50:  # of whose blocks there is one width
            choose("MODEL.RESNETS.RES2_OUT_CHANNELS", cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, [64])
    for part in PARTS:
        _check_weight_norm(cfg, part)
    for part in ("RETINANET", "ROI_BOX_HEAD"):
        _check_dropout(cfg, part)
    if cfg.MODEL.BACKBONE.NAME in NF_BACKBONES:
        check_nf(cfg)
    _check_rpn(cfg)
    _check_matchers(cfg)
    _check_crop(cfg)
    _check_levels_of_rois(cfg)
    _check_statistics(cfg, "TEST", "population")
    _check_statistics(cfg, "SOLVER", "batch")
    _check_renorm(cfg)
    _check_steps(cfg)
    _check_agc(cfg)
    _check_sources(cfg)
    _check_freezing(cfg)


def reference_processes(cfg: CfgNode, num_processes: int) -> int:
    """For how many processes SOLVER.IMS_PER_BATCH is; Detectron2 scales it with the others."""
    return cfg.SOLVER.get("REFERENCE_WORLD_SIZE", 0) or num_processes


def check_ims_per_batch(cfg: CfgNode, num_processes: int) -> None:
    """Raise InputError unless each process gets the same number of images of a batch."""
    reference = reference_processes(cfg, num_processes)
    if cfg.SOLVER.IMS_PER_BATCH % reference and reference != num_processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH: {cfg.SOLVER.IMS_PER_BATCH!r} is not accepted with "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference}; use a multiple of {reference}"
        )
    for key, value, processes in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, reference),
        ("TEST.PRECISE_BN.IMS_PER_BATCH", cfg.TEST.PRECISE_BN.IMS_PER_BATCH, num_processes),
        ("SOLVER.VIRTUAL_IMAGES", cfg.SOLVER.VIRTUAL_IMAGES, num_processes),
    ):
        if value % processes:
            raise InputError(
                f"{key}: {value!r} is not accepted with {num_processes} processes (--num-gpus, "
                f"--num-machines); use a multiple of {num_processes}"
            )


def resolve_device(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to the CPU where it is Detectron2's default, and there is no GPU.

    Raises:
        InputError: it is not a device, or not one of this machine's.
    """
    cfg.MODEL.DEVICE = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)


def usable_device(key: str, name: str) -> str:
    """The device of a config, or the CPU where it is Detectron2's default and there is no GPU.

    Args:
        key: what the error calls the name.

    Raises:
        InputError: it is not a device, or not one of this machine's.
    """
    if name == "cuda" and not torch.cuda.is_available():
        logger.warning("No CUDA device is available: %s cpu is used instead of cuda", key)
        name = "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            # Not by trying, which takes memory of a GPU that another process may train on.
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} GPUs")
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"{key}: {name!r} is not accepted: {reason}") from e
    return name


def _check_weight_norm(cfg: CfgNode, part: str) -> None:
    key, kind = f"MODEL.{part}.WEIGHT_NORM", cfg.MODEL[part].WEIGHT_NORM
    if kind and (reason := why_not_ours(cfg, part)):
        raise InputError(f"{key}: {kind!r} is not accepted with {reason}")
    if part == "RESNETS" and kind == "ScaledWS":
        raise InputError(
            f"{key}: 'ScaledWS' is not accepted: a ResNet without norms also needs scaled residual "
            f"branches (alpha, beta, SkipInit); use MODEL.BACKBONE.NAME {NF_BACKBONES[0]!r} or "
            f"{NF_BACKBONES[1]!r}, or 'WS' or 'WN'"
        )
    if kind == "WS" and not cfg.MODEL[part].NORM:
        raise InputError(
            f"{key}: 'WS' is not accepted with MODEL.{part}.NORM '': it leaves the scale of "
            "outputs to a norm; use a NORM, or 'ScaledWS' or 'WN'"
        )


def _check_dropout(cfg: CfgNode, part: str) -> None:
    key, rate = f"MODEL.{part}.DROPOUT", cfg.MODEL[part].DROPOUT
    if rate and (reason := why_not_ours(cfg, part)):
        raise InputError(f"{key}: {rate!r} is not accepted with {reason}")


def _check_rpn(cfg: CfgNode) -> None:
    name, norm = cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.RPN.NORM
    # Another head may know the key.
    if norm and name == "StandardRPNHead" and is_built(cfg, "RPN"):
        raise InputError(
            f"MODEL.RPN.NORM: {norm!r} is not accepted with MODEL.RPN.HEAD_NAME {name!r}, which "
            "has none; use '', or HEAD_NAME 'BNRPNHead'"
        )


def _check_matchers(cfg: CfgNode) -> None:
    for part in MATCHERS:
        thresholds = cfg.MODEL[part].get("IOU_THRESHOLDS")  # torchvision's RetinaNet has its own
        if thresholds is None:
            continue
        if list(thresholds) != sorted(thresholds):
            raise InputError(
                f"MODEL.{part}.IOU_THRESHOLDS: {thresholds!r} is not accepted; use ascending ones"
            )
        labels = cfg.MODEL[part].get("IOU_LABELS")  # a matcher of Detectron2
        if labels is not None and thresholds[0] == 0:
            raise InputError(
                f"MODEL.{part}.IOU_THRESHOLDS: {thresholds!r} is not accepted; use more than 0"
            )
        if labels is not None and len(labels) != len(thresholds) + 1:
            raise InputError(
                f"MODEL.{part}.IOU_LABELS: {labels!r} is not accepted with IOU_THRESHOLDS "
                f"{thresholds!r}; use one more label than there are thresholds"
            )


def _check_crop(cfg: CfgNode) -> None:
    crop = cfg.INPUT.get("CROP")
    if crop is None or not crop.ENABLED:
        return
    size, kind = crop.SIZE, crop.TYPE
    fits = max(size) <= 1 if kind.startswith("relative") else all(n == int(n) for n in size)
    if kind == "absolute_range":
        fits = fits and size[0] <= size[-1]
    if len(size) != 2 or not fits:
        wanted = {
            "absolute": "two numbers of pixels, of height and width",
            "absolute_range": "two numbers of pixels, the least and the most",
        }.get(kind, "two parts of height and width, 1.0 at most")
        raise InputError(
            f"INPUT.CROP.SIZE: {size!r} is not accepted with INPUT.CROP.TYPE {kind!r}; use {wanted}"
        )


def _check_levels_of_rois(cfg: CfgNode) -> None:
    """Raise InputError where the BN of RoIs is to be per level, and their levels are not known."""
    if not is_per_level(cfg, "ROI_BOX_HEAD") or not is_built(cfg, "ROI_BOX_HEAD"):
        return
    box_head, choices = cfg.MODEL.ROI_BOX_HEAD, dict(cfg.MODEL.ROI_BOX_HEAD.BN)
    start = f"MODEL.ROI_BOX_HEAD.BN: {choices} is not accepted with"
    ours = {"ROI_HEADS": "BNCascadeROIHeads", "ROI_BOX_HEAD": "BNFastRCNNConvFCHead"}
    for node, name in ours.items():
        found = cfg.MODEL[node].NAME
        if found != name:
            raise InputError(
                f"{start} MODEL.{node}.NAME {found!r}: only {name!r} can tell RoIs of several "
                "levels apart; use that, or 'shared' for all"
            )
    if box_head.SHUFFLE:
        raise InputError(
            f"{start} MODEL.ROI_BOX_HEAD.SHUFFLE True: RoIs of other processes come from other "
            "levels; use SHUFFLE False, or 'shared' for all"
        )
    if box_head.NORM == "GhostBN" and choices["STATISTICS"] == "shared":
        raise InputError(
            f"{start} MODEL.ROI_BOX_HEAD.NORM 'GhostBN': levels of different numbers of RoIs have "
            "no ghost batches in common; use STATISTICS 'per_domain', or 'shared' for all"
        )


def _check_sources(cfg: CfgNode) -> None:
    """Raise InputError unless every data set is of a source, where some part tells them apart."""
    node, entries = cfg.MODEL.BN_SOURCES, cfg.DATASETS.SOURCES
    for entry in entries:
        is_list = isinstance(entry, (list, tuple)) and len(entry) > 1
        if not is_list or not all(isinstance(e, str) and e for e in entry):
            raise InputError(
                f"DATASETS.SOURCES: {entry!r} is not accepted; each entry is a list [source, data "
                "set, ...] of names, with one data set or more"
            )
    names = [name for _, *names in entries for name in names]
    for what, values in (("source", [entry[0] for entry in entries]), ("data set", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(f"DATASETS.SOURCES: the {what} {twice[0]!r} stands there twice")
    if not node.PARTS:
        return
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, _NAME_SOURCES)
    for part in node.PARTS:
        if not has_our_batch_norm(cfg, part):
            raise InputError(
                f"MODEL.BN_SOURCES.PARTS: {part!r} is not accepted with MODEL.{part}.NORM "
                f"{cfg.MODEL[part].NORM!r}; use a NORM in {list(BATCH_NORMS)}, and our component"
            )
    for split in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[split]:
            if name not in names:
                raise InputError(
                    f"DATASETS.{split}: {name!r} is of no source; add it to the list of its "
                    f"source in DATASETS.SOURCES, which has {[list(e) for e in entries]}"
                )


_NAME_SOURCES = (*DENSE, "BNGeneralizedRCNN")
"""The meta-architectures that tell their layers the images' sources."""


def _check_statistics(cfg: CfgNode, node: str, default: str) -> None:
    """Raise InputError if another normalization than by default is asked of what has no choice.

    Args:
        node: "TEST" or "SOLVER".
        default: what its BN_STATISTICS is where nothing is asked.
    """
    statistics, parts = cfg[node].BN_STATISTICS, cfg[node].BN_STATISTICS_PARTS
    if statistics == default:
        return
    has_batch = {part: has_our_batch_norm(cfg, part) for part in PARTS}
    for part in parts:
        if not has_batch[part]:
            key, names = COMPONENTS[part]
            raise InputError(
                f"{node}.BN_STATISTICS: {statistics!r} is not accepted for {part}, which has no "
                f"batch statistics with MODEL.{part}.NORM {cfg.MODEL[part].NORM!r} and MODEL.{key} "
                f"{attrgetter(key)(cfg.MODEL)!r}; use {default!r}, or a NORM in "
                f"{list(BATCH_NORMS)} and a MODEL.{key} in {list(names)}"
            )
    if not any(has_batch.values()):
        raise InputError(
            f"{node}.BN_STATISTICS: {statistics!r} is not accepted: no part of the model has batch "
            f"statistics; use {default!r}, or a NORM in {list(BATCH_NORMS)} with our components"
        )


def _check_renorm(cfg: CfgNode) -> None:
    node = cfg.SOLVER.BRN
    for key in ("R_MAX_ITER", "D_MAX_ITER"):
        if node[key] < node.WARMUP_ITERS:
            raise InputError(
                f"SOLVER.BRN.{key}: {node[key]!r} is not accepted with WARMUP_ITERS "
                f"{node.WARMUP_ITERS!r}; use as many or more"
            )
    if cfg.SOLVER.BN_STATISTICS == "population":
        for part in cfg.SOLVER.BN_STATISTICS_PARTS or PARTS:
            if cfg.MODEL[part].NORM == "BRN" and has_our_batch_norm(cfg, part):
                raise InputError(
                    f"SOLVER.BN_STATISTICS: 'population' is not accepted with MODEL.{part}.NORM "
                    "'BRN', which corrects batch statistics; use 'batch', or NORM 'BN'"
                )


def _check_agc(cfg: CfgNode) -> None:
    node, other = cfg.SOLVER.AGC, cfg.SOLVER.get("CLIP_GRADIENTS")
    if node.ENABLED and other is not None and other.ENABLED:
        raise InputError(
            "SOLVER.AGC.ENABLED: True is not accepted with SOLVER.CLIP_GRADIENTS.ENABLED True, "
            "which would clip what has been clipped; use one of them"
        )


def _check_steps(cfg: CfgNode) -> None:
    freeze, last = cfg.SOLVER.FREEZE_BN_ITER, cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.ACCUMULATE > 1 and freeze >= last:
        raise InputError(
            f"SOLVER.FREEZE_BN_ITER: {freeze!r} is not accepted with SOLVER.ACCUMULATE "
            f"{cfg.SOLVER.ACCUMULATE!r} and SOLVER.MAX_ITER {last!r}: iterations are steps of the "
            "optimizer, not batches; use less than MAX_ITER, or 0 (for never)"
        )
    _check_virtual(cfg)


def _check_virtual(cfg: CfgNode) -> None:
    number = cfg.SOLVER.VIRTUAL_IMAGES
    if number and cfg.SOLVER.ACCUMULATE > 1:
        raise InputError(
            f"SOLVER.VIRTUAL_IMAGES: {number!r} is not accepted with SOLVER.ACCUMULATE "
            f"{cfg.SOLVER.ACCUMULATE!r}: extra images are for the one batch of a step; use 0"
        )
    if number and not any(has_our_batch_norm(cfg, part) for part in PARTS):
        raise InputError(
            f"SOLVER.VIRTUAL_IMAGES: {number!r} is not accepted: no part of the model has a batch; "
            f"use 0, or a NORM in {list(BATCH_NORMS)} with our components"
        )
    is_frozen = cfg.SOLVER.BN_STATISTICS == "population" and not cfg.SOLVER.UPDATE_POPULATION
    if number and is_frozen and not cfg.SOLVER.BN_STATISTICS_PARTS:
        raise InputError(
            f"SOLVER.VIRTUAL_IMAGES: {number!r} is not accepted with SOLVER.BN_STATISTICS "
            "'population' and UPDATE_POPULATION False: no batch is used for anything; use 0"
        )


def _check_freezing(cfg: CfgNode) -> None:
    for key, none in (("FREEZE_BN_ITER", 0), ("FREEZE_BN_MODULES", ())):
        value = cfg.SOLVER[key]
        if value and cfg.TEST.BN_STATISTICS == "batch":
            raise InputError(
                f"SOLVER.{key}: {value!r} is not accepted with TEST.BN_STATISTICS 'batch': frozen "
                f"layers normalize by population statistics; use {none!r}"
            )
