"""What values keys accept: ours, and the hosts' own where these do not say so themselves.

Detectron2 looks at few of its values: others end in a traceback, train with weights that are NaN,
or evaluate a net that was never trained. A key that a host or a project does not have is not looked
at; what is only wrong together with other keys is in ``check.py``.
"""

from __future__ import annotations

import math
from typing import Any

from yacs.config import CfgNode

from ..errors import InputError, is_text
from .keys import leaves
from .ours import KEYS
from .parts import MATCHERS
from .rules import (
    ANY,
    CHANNELS,
    CLASSES,
    COUNT,
    IMAGES,
    ITERATIONS,
    LAYERS,
    NAMES,
    NUMBER,
    Rule,
    above,
    below,
    between,
    each,
    one_of,
    optional,
    within,
)

_FOR_EACH = each(each(above(0), may_be_empty=False), (list, tuple), may_be_empty=False)
_FOR_ALL = each(above(0), may_be_empty=False)
_OF_ANCHORS = Rule(
    lambda values: _FOR_EACH.accepts(values) or _FOR_ALL.accepts(values),
    "a list of numbers more than 0 for all levels, or such a list for each",
)

_SIDE = between(0, 2**15)

_MATCHING = {
    "IOU_THRESHOLDS": each(NUMBER, may_be_empty=False),
    "IOU_LABELS": each(one_of(-1, 0, 1), int),
}
"""Of a part that matches anchors or boxes with objects."""

RANGES: dict[str, Rule] = {
    **{key: described.rule for key, described in KEYS.items()},
    "VERSION": one_of(1, 2),
    "SEED": between(-1, 2**31 - 1),
    "OUTPUT_DIR": Rule(
        lambda value: value and "://" not in value, "the path of a folder, which is no address"
    ),
    "DATASETS.TRAIN": NAMES,
    "DATASETS.TEST": NAMES,
    "DATALOADER.NUM_WORKERS": between(0, 512),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        *("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
        *("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"),
    ),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": each(above(0), may_be_empty=False),
    "INPUT.FORMAT": one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MIN_SIZE_TRAIN": each(_SIDE, int, may_be_empty=False),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.MIN_SIZE_TEST": _SIDE,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "MODEL.PIXEL_MEAN": each(ANY, may_be_empty=False),
    "MODEL.PIXEL_STD": each(above(0), may_be_empty=False),
    "MODEL.ANCHOR_GENERATOR.SIZES": _OF_ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _OF_ANCHORS,
    "MODEL.BACKBONE.FREEZE_AT": NUMBER,
    "MODEL.FPN.OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.NUM_GROUPS": CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": CHANNELS,
    "MODEL.RETINANET.NUM_CLASSES": CLASSES,
    "MODEL.RETINANET.NUM_CONVS": LAYERS,
    "MODEL.RETINANET.PRIOR_PROB": within(0, 1),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": between(0, 1),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": NUMBER,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": NUMBER,
    "MODEL.RETINANET.SCORE_THRESH_TEST": between(0, 1),
    "MODEL.RETINANET.NMS_THRESH_TEST": between(0, 1),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNT,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": between(0, 1),
    "MODEL.RPN.NMS_THRESH": between(0, 1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": COUNT,
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": between(0, 1),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": between(0, 1),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": between(0, 1),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": between(1, 1000),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": between(0, 1000),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": LAYERS,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_BOX_HEAD.NUM_FC": LAYERS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": CHANNELS,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": between(1, 1000),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": between(0, 1000),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": LAYERS,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": CHANNELS,
    **{f"MODEL.{part}.{of}": rule for part in MATCHERS for of, rule in _MATCHING.items()},
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.IMS_PER_BATCH": IMAGES,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": NUMBER,
    "SOLVER.BASE_LR": above(0),
    "SOLVER.BIAS_LR_FACTOR": NUMBER,
    "SOLVER.MOMENTUM": below(0, 1),
    "SOLVER.WEIGHT_DECAY": NUMBER,
    "SOLVER.WEIGHT_DECAY_NORM": NUMBER,
    "SOLVER.WEIGHT_DECAY_BIAS": optional(NUMBER),
    "SOLVER.GAMMA": above(0),
    "SOLVER.STEPS": each(NUMBER, int),
    "SOLVER.WARMUP_ITERS": NUMBER,
    "SOLVER.WARMUP_FACTOR": between(0, 1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0),
    "TEST.PRECISE_BN.NUM_ITER": ITERATIONS,
    "TEST.EVAL_PERIOD": NUMBER,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
}


def check_ranges(cfg: CfgNode) -> None:
    """Raise InputError for values that RANGES does not accept, and what no key takes."""
    values = dict(leaves(cfg))
    for key, value in values.items():
        check_value(key, value, RANGES.get(key, ANY))
    mean, std = (values.get(f"MODEL.PIXEL_{of}", ()) for of in ("MEAN", "STD"))
    if len(mean) != len(std):
        raise InputError(
            f"MODEL.PIXEL_STD: {std!r} is not accepted with MODEL.PIXEL_MEAN {mean!r}; use as many "
            "values, one for each channel"
        )


def check_value(key: str, value: Any, rule: Rule) -> None:
    """Raise InputError for what a rule does not accept, for no finite number, and for no text."""
    for accepts, words in (
        (_is_finite, "numbers that are finite"),
        (_can_be_written, "text of UTF-8, without NUL"),
        rule,
    ):
        if not accepts(value):
            raise InputError(f"{key}: {value!r} is not accepted; use {words}")


def _can_be_written(value: Any) -> bool:
    """Whether texts, at any depth, can stand in a file, or be the name of one."""
    if isinstance(value, (list, tuple)):
        return all(map(_can_be_written, value))
    return not isinstance(value, str) or (is_text(value) and "\0" not in value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
