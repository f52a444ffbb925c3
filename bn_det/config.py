"""Our config keys, on any yacs CfgNode."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch
import yaml
from yacs.config import CfgNode

from .errors import InputError, choose
from .layers import BATCH_NORMS, SHARING, level_norm_factory, norm_factory
from .layers.norms import NormFactory

logger = logging.getLogger(__name__)


PARTS = ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
"""The nodes of MODEL that have a NORM."""


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

    # Whether training mixes the RoIs of all processes before the head.
    cfg.MODEL.ROI_BOX_HEAD.SHUFFLE = False
    cfg.MODEL.ROI_MASK_HEAD.SHUFFLE = False

    # Whether the processes' EMAs are averaged before evaluation and saving. Without it each
    # process evaluates with its own, and those of process 0 are saved.
    cfg.SOLVER.AVERAGE_BN_STATISTICS = True

    # What normalizes in evaluation: "population" statistics, or those of the "batch", in the parts
    # of the model that are named (MODEL.RESNETS is "RESNETS" and so on); in all if none is.
    cfg.TEST.BN_STATISTICS = "population"
    cfg.TEST.BN_STATISTICS_PARTS = []

    # Data sets of one's own in COCO's format: a list of [name, JSON file, folder of images]. The
    # names can then stand in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.REGISTER_COCO = []


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


def resolve_device(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to the CPU where it is Detectron2's default, and there is no GPU.

    Raises:
        InputError: it is not a device, or not one of this machine's.
    """
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.warning("No CUDA device is available: MODEL.DEVICE cpu is used instead of cuda")
        cfg.MODEL.DEVICE = "cpu"
    try:
        torch.empty(0, device=cfg.MODEL.DEVICE)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"MODEL.DEVICE: {cfg.MODEL.DEVICE!r} is not accepted: {reason}") from e


def _reason(error: Exception, host: str) -> str:
    reason = str(error.args[0] if error.args else error).removesuffix(".")
    if "Non-existent" in reason:
        reason += f" (the {host} host does not know it)"
    return reason
