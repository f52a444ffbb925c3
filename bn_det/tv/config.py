"""The config keys that the torchvision host understands: Detectron2's names and defaults."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ..config.check import DEPTHS
from ..config.keys import add_bn_det_config
from ..config.parts import NF_BACKBONES, RCNNS
from ..errors import InputError, check_positive, choose

NUM_LEVELS = 5
"""The levels that have anchors: p3 to p7 of RetinaNet, p2 to p6 of the R-CNNs."""

POOLER_TYPES = {"ROIAlign": False, "ROIAlignV2": True}
"""How RoIs are pooled, and whether that is RoIAlign with the correction by half a pixel."""

_DEFAULTS = {
    "VERSION": 2,
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "MASK_ON": False,
        "DEVICE": "cuda",
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.530, 116.280, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "RES2_OUT_CHANNELS": 256,
        },
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": ""},
        "ANCHOR_GENERATOR": {
            "SIZES": [[32, 64, 128, 256, 512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "OFFSET": 0.0,
        },
        "PROPOSAL_GENERATOR": {"NAME": "RPN", "MIN_SIZE": 0},
        "RPN": {
            "HEAD_NAME": "StandardRPNHead",
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.3, 0.7],
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            "SMOOTH_L1_BETA": 0.0,
            "PRE_NMS_TOPK_TRAIN": 12000,
            "PRE_NMS_TOPK_TEST": 6000,
            "POST_NMS_TOPK_TRAIN": 2000,
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
            "CONV_DIMS": [-1],
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads",
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.5],
            "BATCH_SIZE_PER_IMAGE": 512,
            "POSITIVE_FRACTION": 0.25,
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
        },
        "ROI_BOX_HEAD": {
            "NAME": "",
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NUM_FC": 0,
            "FC_DIM": 1024,
            "NORM": "",
            "CLS_AGNOSTIC_BBOX_REG": False,
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "POOLER_TYPE": "ROIAlignV2",
            "SMOOTH_L1_BETA": 0.0,
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "POOLER_TYPE": "ROIAlignV2",
        },
        "RETINANET": {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CONVS": 4,
            "NORM": "",
            "SMOOTH_L1_LOSS_BETA": 0.1,
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
        },
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": (800,),
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",
        "FORMAT": "BGR",
        "MASK_FORMAT": "polygon",
    },
    "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": {"NUM_WORKERS": 4, "FILTER_EMPTY_ANNOTATIONS": True},
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "MAX_ITER": 40000,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "GAMMA": 0.1,
        "STEPS": (30000,),
        "WARMUP_FACTOR": 1.0 / 1000,
        "WARMUP_ITERS": 1000,
        "CHECKPOINT_PERIOD": 5000,
        "IMS_PER_BATCH": 16,
        "AMP": {"ENABLED": False},
    },
    "TEST": {
        "EVAL_PERIOD": 0,
        "DETECTIONS_PER_IMAGE": 100,
        "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
    },
    "OUTPUT_DIR": "./output",
    "SEED": -1,
}


def get_cfg() -> CfgNode:
    """A config with the keys that the torchvision host understands, at Detectron2's defaults.

    Merging a file or a list that sets any other key raises KeyError, which names it.
    """
    cfg = CfgNode(_DEFAULTS)
    add_bn_det_config(cfg)
    return cfg


def check_cfg(cfg: CfgNode) -> None:
    """Raise InputError if a value asks for what the torchvision host does not have."""
    architectures = {"BNRetinaNet": _check_retinanet, **dict.fromkeys(RCNNS, _check_rcnn)}
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    architectures[cfg.MODEL.META_ARCHITECTURE](cfg)
    choose("MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT, range(6))
    if cfg.MODEL.BACKBONE.NAME not in NF_BACKBONES:
        _check_resnet(cfg)
    _check_anchors(cfg)
    choose("INPUT.FORMAT", cfg.INPUT.FORMAT, ["BGR", "RGB"])
    # The same here: masks are bits, whatever they are in the file.
    schedules = ["WarmupMultiStepLR", "WarmupCosineLR"]
    choose("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, schedules)
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        check_positive(f"SOLVER.{key}", cfg.SOLVER[key])


def _check_retinanet(cfg: CfgNode) -> None:
    choose("MODEL.MASK_ON", cfg.MODEL.MASK_ON, [False])
    _choose(cfg, "BACKBONE.NAME", "build_bn_retinanet_resnet_fpn_backbone", NF_BACKBONES[1])
    _choose(cfg, "FPN.IN_FEATURES", ["res3", "res4", "res5"])
    _choose(cfg, "RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"])
    # torchvision's loss is L1, which is 0.0; 0.1 is what a config has that says nothing.
    beta = cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA
    choose("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", beta, [0.0, 0.1])


def _check_rcnn(cfg: CfgNode) -> None:
    levels = ["p2", "p3", "p4", "p5"]
    backbones = ["build_bn_resnet_fpn_backbone", "build_resnet_fpn_backbone", NF_BACKBONES[0]]
    _choose(cfg, "BACKBONE.NAME", *backbones)
    _choose(cfg, "FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"])
    _choose(cfg, "PROPOSAL_GENERATOR.NAME", "RPN")
    _choose(cfg, "RPN.HEAD_NAME", "StandardRPNHead", "BNRPNHead")
    _choose(cfg, "RPN.IN_FEATURES", [*levels, "p6"])
    _choose(cfg, "ROI_HEADS.NAME", "StandardROIHeads")
    _choose(cfg, "ROI_HEADS.IN_FEATURES", levels)
    _choose(cfg, "ROI_BOX_HEAD.NAME", "BNFastRCNNConvFCHead")
    agnostic = cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    choose("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic, [False])
    heads = ["ROI_BOX_HEAD"]
    if cfg.MODEL.MASK_ON:
        heads.append("ROI_MASK_HEAD")
        _choose(cfg, "ROI_MASK_HEAD.NAME", "BNMaskRCNNConvUpsampleHead")
    for head in heads:
        _choose(cfg, f"{head}.POOLER_TYPE", *POOLER_TYPES)
    dims = cfg.MODEL.RPN.CONV_DIMS
    if any(dim < 1 and dim != -1 for dim in dims):
        raise InputError(
            f"MODEL.RPN.CONV_DIMS: {dims!r} is not accepted; use numbers of channels, or -1 for as "
            "many as before"
        )
    for part, count in (("RPN", 2), ("ROI_HEADS", 1)):
        thresholds = cfg.MODEL[part].IOU_THRESHOLDS
        if len(thresholds) != count:
            raise InputError(
                f"MODEL.{part}.IOU_THRESHOLDS: {thresholds!r} is not accepted; use {count} "
                f"number{'s' * (count > 1)}"
            )
    if cfg.MODEL.ROI_BOX_HEAD.NUM_CONV + cfg.MODEL.ROI_BOX_HEAD.NUM_FC < 1:
        raise InputError(
            "MODEL.ROI_BOX_HEAD.NUM_FC: 0 is not accepted with NUM_CONV 0; use 1 or more layers"
        )


def _check_resnet(cfg: CfgNode) -> None:
    choose("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, DEPTHS)
    for feature in cfg.MODEL.FPN.IN_FEATURES:
        if feature not in cfg.MODEL.RESNETS.OUT_FEATURES:
            raise InputError(
                f"MODEL.RESNETS.OUT_FEATURES: {list(cfg.MODEL.RESNETS.OUT_FEATURES)} lacks "
                f"{feature!r} of MODEL.FPN.IN_FEATURES"
            )
    deep = cfg.MODEL.RESNETS.DEPTH >= 50
    res2_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    choose("MODEL.RESNETS.RES2_OUT_CHANNELS", res2_channels, [256 if deep else 64])
    if deep:  # torchvision has the stride in the 3x3 convolution
        choose("MODEL.RESNETS.STRIDE_IN_1X1", cfg.MODEL.RESNETS.STRIDE_IN_1X1, [False])


def _check_anchors(cfg: CfgNode) -> None:
    for name in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[name]
        nested = all(isinstance(v, (list, tuple)) for v in values)
        if not nested or len(values) not in (1, NUM_LEVELS) or len({len(v) for v in values}) > 1:
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{name}: {values!r} is not accepted; use one list in a "
                f"list, or {NUM_LEVELS} of the same length, one for each level"
            )


def _choose(cfg: CfgNode, key: str, *accepted: str | list[str]) -> None:
    """Check a key of MODEL whose value is a name, or a list (in YAML; maybe a tuple) of names."""
    part, name = key.split(".")
    value = cfg.MODEL[part][name]
    choose(f"MODEL.{key}", value if isinstance(value, str) else list(value), accepted)
