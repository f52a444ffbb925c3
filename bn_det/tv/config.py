"""The config keys that the torchvision host understands: Detectron2's names and defaults."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ..config import add_bn_det_config
from ..errors import InputError, choose

_DEFAULTS = {
    "VERSION": 2,
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
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
        "RETINANET": {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CONVS": 4,
            "NORM": "",
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
        },
        "ROI_BOX_HEAD": {"NORM": ""},
        "ROI_MASK_HEAD": {"NORM": ""},
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": (800,),
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",
        "FORMAT": "BGR",
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
    },
    "TEST": {"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100},
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
    levels = ["p3", "p4", "p5", "p6", "p7"]
    choose("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, ["BNRetinaNet"])
    choose(
        "MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, ["build_bn_retinanet_resnet_fpn_backbone"]
    )
    choose("MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT, range(6))
    choose("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, [18, 34, 50, 101, 152])
    choose("MODEL.FPN.IN_FEATURES", list(cfg.MODEL.FPN.IN_FEATURES), [["res3", "res4", "res5"]])
    choose("MODEL.RETINANET.IN_FEATURES", list(cfg.MODEL.RETINANET.IN_FEATURES), [levels])
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
    choose("INPUT.FORMAT", cfg.INPUT.FORMAT, ["BGR", "RGB"])
    choose("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ["horizontal", "vertical", "none"])
    schedules = ["WarmupMultiStepLR", "WarmupCosineLR"]
    choose("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, schedules)
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise InputError(f"SOLVER.{key}: {cfg.SOLVER[key]!r} is not accepted; use 1 or more")
    for name in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[name]
        nested = all(isinstance(v, (list, tuple)) for v in values)
        if not nested or len(values) not in (1, len(levels)) or len({len(v) for v in values}) > 1:
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{name}: {values!r} is not accepted; use one list in a "
                f"list, or {len(levels)} of the same length, one for each level"
            )
