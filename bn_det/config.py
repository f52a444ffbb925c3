"""Our config keys, on any yacs CfgNode."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from .errors import InputError, choose
from .estimate import ESTIMATORS
from .layers import BATCH_NORMS, SHARING, level_norm_factory, norm_factory
from .layers.batch_norm import STATISTICS
from .layers.ghost import GHOST_ORDERS
from .layers.norms import NormFactory

logger = logging.getLogger(__name__)

PARTS = ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
"""The nodes of MODEL that have a NORM."""

SOURCE_PARTS = PARTS[:3]
"""Those that are called with images, not RoIs, and so can tell the sources of images apart."""


def add_bn_det_config(cfg: CfgNode) -> None:
    """Add the keys of bn_det to a config that has Detectron2's, in place."""
    node = type(cfg)

    # For NORM "GhostBN": how many samples (images, or RoIs in a RoI head) are normalized together,
    # and which: "contiguous" or "random".
    for part in PARTS:
        cfg.MODEL[part].GHOST_SIZE = 0
        cfg.MODEL[part].GHOST_ORDER = "contiguous"

    # What the levels of RetinaNet's head share where MODEL.RETINANET.NORM is "BN", "SyncBN" or
    # "GhostBN": each choice is "shared" or "per_domain" (per level). See bn_det.DomainBatchNorm2d.
    cfg.MODEL.RETINANET.BN = node()
    # whose samples normalize in training
    cfg.MODEL.RETINANET.BN.STATISTICS = "per_domain"
    # whose statistics are kept for test time
    cfg.MODEL.RETINANET.BN.POPULATION = "per_domain"
    # whether levels share weight and bias
    cfg.MODEL.RETINANET.BN.AFFINE = "shared"

    # Parts whose BatchNorm has statistics for each source of images (DATASETS.SOURCES), and whether
    # sources share weight and bias in backbone and FPN. See bn_det.SourceBatchNorm2d.
    cfg.MODEL.BN_SOURCES = node()
    cfg.MODEL.BN_SOURCES.PARTS = []
    cfg.MODEL.BN_SOURCES.AFFINE = "shared"

    # Whether training mixes the RoIs of all processes before the head.
    cfg.MODEL.ROI_BOX_HEAD.SHUFFLE = False
    cfg.MODEL.ROI_MASK_HEAD.SHUFFLE = False

    # Whether the processes' EMAs are averaged before evaluation and saving. Without it each
    # process evaluates with its own, and those of process 0 are saved.
    cfg.SOLVER.AVERAGE_BN_STATISTICS = True

    # From which iteration on BatchNorm is frozen in training; 0 for never. FREEZE_BN_AFFINE: weight
    # and bias, too. FREEZE_BN_PRECISE: with statistics that PreciseBN recomputes right before.
    cfg.SOLVER.FREEZE_BN_ITER = 0
    cfg.SOLVER.FREEZE_BN_AFFINE = False
    cfg.SOLVER.FREEZE_BN_PRECISE = True

    # Population statistics that are recomputed before each evaluation and each saving, from
    # NUM_ITER batches of each process, or as many as TOLERANCE asks for (0.0: all of them). See
    # bn_det.update_bn_stats. IMS_PER_BATCH: images in a batch of all processes; 0: as in training.
    cfg.TEST.PRECISE_BN.TOLERANCE = 0.0
    cfg.TEST.PRECISE_BN.ESTIMATOR = "population_variance"
    cfg.TEST.PRECISE_BN.IMS_PER_BATCH = 0

    # What normalizes in evaluation: "population" statistics, or those of the "batch", in the parts
    # of the model that are named (MODEL.RESNETS is "RESNETS" and so on); in all if none is.
    cfg.TEST.BN_STATISTICS = "population"
    cfg.TEST.BN_STATISTICS_PARTS = []

    # Data sets of one's own in COCO's format: a list of [name, JSON file, folder of images]. The
    # names can then stand in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.REGISTER_COCO = []

    # Sources of images (labs, sensors): a list of [source, data set, data set, ...].
    cfg.DATASETS.SOURCES = []


def part_norm(cfg: CfgNode, part: str, others: Mapping[str, NormFactory]) -> NormFactory | None:
    """The norm that a part of the model asks for by its NORM; see ``norm_factory``.

    Args:
        part: one of PARTS.
        others: the host's layers that have no choice of batch, by name.
    """
    node = cfg.MODEL[part]
    return norm_factory(
        node.NORM,
        others,
        f"MODEL.{part}.NORM",
        ghost_size=node.GHOST_SIZE,
        ghost_order=node.GHOST_ORDER,
        eval_statistics=_eval_statistics(cfg, part),
        num_sources=_num_sources(cfg, part),
        source_affine=cfg.MODEL.BN_SOURCES.AFFINE,
    )


def shuffle_of(cfg: CfgNode, part: str) -> bool:
    """Whether training is to shuffle the RoIs of a head, as its SHUFFLE says.

    Where its NORM has no batch, shuffling would change nothing: a warning says so, and the answer
    is no.

    Args:
        part: "ROI_BOX_HEAD" or "ROI_MASK_HEAD".
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


def retinanet_norm(
    cfg: CfgNode, others: Mapping[str, NormFactory], num_levels: int
) -> NormFactory | None:
    """The norm of RetinaNet's head that MODEL.RETINANET asks for; see ``level_norm_factory``."""
    node = cfg.MODEL.RETINANET
    return level_norm_factory(
        node.NORM,
        others,
        num_levels,
        statistics=node.BN.STATISTICS,
        population=node.BN.POPULATION,
        affine=node.BN.AFFINE,
        key="MODEL.RETINANET.NORM",
        ghost_size=node.GHOST_SIZE,
        ghost_order=node.GHOST_ORDER,
        eval_statistics=_eval_statistics(cfg, "RETINANET"),
        num_sources=_num_sources(cfg, "RETINANET"),
    )


def load_config(cfg: CfgNode, config_file: str, opts: Sequence[str], host: str) -> None:
    """Merge a config file, then KEY VALUE pairs, into a config, in place. YAML is loaded safely.

    Raises:
        InputError: a file is missing or not a config, or a key or value is not accepted.
    """
    if config_file and not os.path.isfile(config_file):
        raise InputError(f"--config-file: there is no file {config_file}")
    try:
        if config_file:
            # Detectron2 allows python tags unless told otherwise; other hosts do not know of them.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as e:
        raise InputError(f"--config-file: {config_file}: there is no file {e.filename}") from e
    except (yaml.YAMLError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"--config-file: {config_file} is not a config file: {reason}") from e
    except (KeyError, ValueError, AssertionError) as e:
        raise InputError(f"--config-file: {config_file}: {_reason(e, host)}") from e
    if len(opts) % 2:
        raise InputError(f"{opts[-1]}: has no value; the end of the command is KEY VALUE pairs")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as e:
            raise InputError(f"{key}: {value!r} is not accepted: {_reason(e, host)}") from e
    for choice in ("STATISTICS", "POPULATION", "AFFINE"):
        choose(f"MODEL.RETINANET.BN.{choice}", cfg.MODEL.RETINANET.BN[choice], SHARING)
    for part in PARTS:
        choose(f"MODEL.{part}.GHOST_ORDER", cfg.MODEL[part].GHOST_ORDER, GHOST_ORDERS)
    _check_bn_statistics(cfg)
    _check_sources(cfg)
    _check_precise_bn(cfg)


def precise_bn_of(cfg: CfgNode) -> dict[str, Any]:
    """What TEST.PRECISE_BN says, as arguments of ``bn_det.hooks.PreciseBN``."""
    node = cfg.TEST.PRECISE_BN
    return {
        "periods": [cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD],
        "num_iter": node.NUM_ITER,
        "tolerance": node.TOLERANCE,
        "estimator": node.ESTIMATOR,
    }


def uses_precise_bn(cfg: CfgNode) -> bool:
    """Whether a training needs a PreciseBN hook, now and then or before freezing."""
    before_freezing = cfg.SOLVER.FREEZE_BN_ITER > 0 and cfg.SOLVER.FREEZE_BN_PRECISE
    return cfg.TEST.PRECISE_BN.ENABLED or before_freezing


def source_of(cfg: CfgNode) -> dict[str, int]:
    """The number of the source of each data set that DATASETS.SOURCES names."""
    return {name: k for k, (_, *names) in enumerate(cfg.DATASETS.SOURCES) for name in names}


def with_precise_bn_batches(cfg: CfgNode) -> CfgNode:
    """The config with the batches of PreciseBN, and their number, in place of the training's."""
    cfg, node = cfg.clone(), cfg.TEST.PRECISE_BN
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = node.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.MAX_ITER = node.NUM_ITER
    return cfg


def check_ims_per_batch(cfg: CfgNode, num_processes: int) -> None:
    """Raise InputError unless each process gets the same number of images of a batch."""
    for key, value in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("TEST.PRECISE_BN.IMS_PER_BATCH", cfg.TEST.PRECISE_BN.IMS_PER_BATCH),
    ):
        if value % num_processes:
            raise InputError(
                f"{key}: {value!r} is not accepted with {num_processes} processes (--num-gpus, "
                f"--num-machines); use a multiple of {num_processes}"
            )


def resolve_device(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to the CPU where it is Detectron2's default, and there is no GPU.

    Raises:
        InputError: it is not a device, or not one of this machine's.
    """
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.warning("No CUDA device is available: MODEL.DEVICE cpu is used instead of cuda")
        cfg.MODEL.DEVICE = "cpu"
    try:
        device = torch.device(cfg.MODEL.DEVICE)
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            # Not by trying, which takes memory of a GPU that another process may train on.
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} GPUs")
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"MODEL.DEVICE: {cfg.MODEL.DEVICE!r} is not accepted: {reason}") from e


def _eval_statistics(cfg: CfgNode, part: str) -> str:
    """What normalizes a part in evaluation."""
    parts = cfg.TEST.BN_STATISTICS_PARTS
    return cfg.TEST.BN_STATISTICS if part in parts or not parts else "population"


def _num_sources(cfg: CfgNode, part: str) -> int:
    """How many sources a part has statistics for; 0 where it does not tell them apart."""
    return len(cfg.DATASETS.SOURCES) if part in cfg.MODEL.BN_SOURCES.PARTS else 0


def _check_sources(cfg: CfgNode) -> None:
    """Raise InputError unless every data set is of a source, where some part tells them apart."""
    node, entries = cfg.MODEL.BN_SOURCES, cfg.DATASETS.SOURCES
    choose("MODEL.BN_SOURCES.AFFINE", node.AFFINE, SHARING)
    for entry in entries:
        is_list = isinstance(entry, (list, tuple)) and len(entry) > 1
        if not is_list or not all(isinstance(e, str) for e in entry):
            raise InputError(
                f"DATASETS.SOURCES: {entry!r} is not accepted; each entry is a list [source, data "
                "set, ...] with one data set or more"
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
        choose("MODEL.BN_SOURCES.PARTS", part, SOURCE_PARTS)
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


_NAME_SOURCES = ("BNRetinaNet", "BNGeneralizedRCNN")
"""The meta-architectures that tell their layers the images' sources."""


def _check_bn_statistics(cfg: CfgNode) -> None:
    """Raise InputError if batch statistics are asked of what has none."""
    choose("TEST.BN_STATISTICS", cfg.TEST.BN_STATISTICS, STATISTICS)
    for part in cfg.TEST.BN_STATISTICS_PARTS:
        choose("TEST.BN_STATISTICS_PARTS", part, PARTS)
    if cfg.TEST.BN_STATISTICS == "population":
        return
    has_batch = {part: has_our_batch_norm(cfg, part) for part in PARTS}
    for part in cfg.TEST.BN_STATISTICS_PARTS:
        if not has_batch[part]:
            key, names = _COMPONENTS[part]
            raise InputError(
                f"TEST.BN_STATISTICS: 'batch' is not accepted for {part}, which has no batch "
                f"statistics with MODEL.{part}.NORM {cfg.MODEL[part].NORM!r} and MODEL.{key} "
                f"{_get(cfg, key)!r}; use 'population', or a NORM in {list(BATCH_NORMS)} and a "
                f"MODEL.{key} in {list(names)}"
            )
    if not any(has_batch.values()):
        raise InputError(
            "TEST.BN_STATISTICS: 'batch' is not accepted: no part of the model has batch "
            f"statistics; use 'population', or a NORM in {list(BATCH_NORMS)} with our components"
        )


def _check_precise_bn(cfg: CfgNode) -> None:
    node = cfg.TEST.PRECISE_BN
    choose("TEST.PRECISE_BN.ESTIMATOR", node.ESTIMATOR, ESTIMATORS)
    if node.NUM_ITER < 1:
        raise InputError(
            f"TEST.PRECISE_BN.NUM_ITER: {node.NUM_ITER!r} is not accepted; use 1 or more"
        )
    if node.IMS_PER_BATCH < 0:
        raise InputError(
            f"TEST.PRECISE_BN.IMS_PER_BATCH: {node.IMS_PER_BATCH!r} is not accepted; use 0 (for "
            "as many as in training) or more"
        )
    if not node.TOLERANCE >= 0:
        raise InputError(
            f"TEST.PRECISE_BN.TOLERANCE: {node.TOLERANCE!r} is not accepted; use 0.0 (for none) or "
            "more"
        )
    if cfg.SOLVER.FREEZE_BN_ITER < 0:
        raise InputError(
            f"SOLVER.FREEZE_BN_ITER: {cfg.SOLVER.FREEZE_BN_ITER!r} is not accepted; use 0 (for "
            "never) or more"
        )
    if cfg.SOLVER.FREEZE_BN_ITER and cfg.TEST.BN_STATISTICS == "batch":
        raise InputError(
            f"SOLVER.FREEZE_BN_ITER: {cfg.SOLVER.FREEZE_BN_ITER!r} is not accepted with "
            "TEST.BN_STATISTICS 'batch': frozen layers normalize by population statistics; use 0"
        )


_BACKBONES = ("build_bn_resnet_fpn_backbone", "build_bn_retinanet_resnet_fpn_backbone")
_COMPONENTS = {
    "RESNETS": ("BACKBONE.NAME", _BACKBONES),
    "FPN": ("BACKBONE.NAME", _BACKBONES),
    "RETINANET": ("META_ARCHITECTURE", ("BNRetinaNet",)),
    "ROI_BOX_HEAD": ("ROI_BOX_HEAD.NAME", ("BNFastRCNNConvFCHead",)),
    "ROI_MASK_HEAD": ("ROI_MASK_HEAD.NAME", ("BNMaskRCNNConvUpsampleHead",)),
}
"""For each part the key below MODEL that says what builds it, and our components."""


def has_our_batch_norm(cfg: CfgNode, part: str) -> bool:
    """Whether a part of the model, one of PARTS, is built with one of BATCH_NORMS by us."""
    if part.startswith("ROI_") and cfg.MODEL.META_ARCHITECTURE == "BNRetinaNet":
        return False
    key, names = _COMPONENTS[part]
    return _get(cfg, key) in names and cfg.MODEL[part].NORM in BATCH_NORMS


def _get(cfg: CfgNode, key: str) -> object:
    """The value of a key below MODEL."""
    value = cfg.MODEL
    for name in key.split("."):
        value = value[name]
    return value


def _reason(error: Exception, host: str) -> str:
    reason = str(error.args[0] if error.args else error).removesuffix(".")
    if "Non-existent" in reason:
        reason += f" (the {host} host does not know it)"
    return reason
