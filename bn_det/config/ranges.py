"""What values the hosts' own keys accept, where the hosts do not say so themselves.

Detectron2 looks at few of its values: others end in a traceback, train with weights that are NaN,
or evaluate a net that was never trained. A key that a host or a project does not have is not looked
at; what is only wrong together with other keys is in ``check.py``, and so are ours, but for
``MODEL.BN_FCOS``, whose keys mean what Detectron2's FCOS calls so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from yacs.config import CfgNode

from ..errors import InputError


class Rule(NamedTuple):
    """What a value has to be.

    Attributes:
        accepts: whether a value is so; its type is the default's.
        words: for the end of a message, after "use".
    """

    accepts: Callable[[Any], bool]
    words: str


def _at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"{low} or more")


def _above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"more than {low}")


def _between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"{low} to {high}")


def _within(low: float, high: float) -> Rule:
    return Rule(lambda value: low < value < high, f"more than {low}, and less than {high}")


def _below(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value < high, f"{low} or more, and less than {high}")


def _one_of(*values: Any) -> Rule:
    return Rule(lambda value: value in values, f"one of {list(values)}")


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.accepts(value), f"None, or {rule.words}")


def _each(
    rule: Rule, of: type | tuple[type, ...] = (int, float), may_be_empty: bool = True
) -> Rule:
    """A list or tuple, of values of a type."""

    def is_one(value: Any) -> bool:
        return isinstance(value, of) and not isinstance(value, bool) and rule.accepts(value)

    def accepts(values: Any) -> bool:
        is_long_enough = may_be_empty or len(values) > 0
        return isinstance(values, (list, tuple)) and is_long_enough and all(map(is_one, values))

    length = "a list" if may_be_empty else "a list of one or more values"
    return Rule(accepts, f"{length}, each {rule.words}")


_ANY = Rule(lambda value: True, "")
_COUNT, _NUMBER = _at_least(1), _at_least(0)
_NAMES = Rule(_each(_ANY, str).accepts, "a list of names")
_FOR_EACH = _each(_each(_above(0), may_be_empty=False), (list, tuple), may_be_empty=False)
_FOR_ALL = _each(_above(0), may_be_empty=False)
_OF_ANCHORS = Rule(
    lambda values: _FOR_EACH.accepts(values) or _FOR_ALL.accepts(values),
    "a list of numbers more than 0 for all levels, or such a list for each",
)

RANGES: dict[str, Rule] = {
    "VERSION": _one_of(1, 2),
    "SEED": _between(-1, 2**31 - 1),
    "OUTPUT_DIR": Rule(bool, "the path of a folder"),
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATALOADER.NUM_WORKERS": _NUMBER,
    "INPUT.FORMAT": _one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN": _each(_NUMBER, int, may_be_empty=False),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MIN_SIZE_TEST": _NUMBER,
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "MODEL.PIXEL_MEAN": _each(_ANY, may_be_empty=False),
    "MODEL.PIXEL_STD": _each(_above(0), may_be_empty=False),
    "MODEL.ANCHOR_GENERATOR.SIZES": _OF_ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _OF_ANCHORS,
    "MODEL.BACKBONE.FREEZE_AT": _NUMBER,
    "MODEL.FPN.OUT_CHANNELS": _COUNT,
    "MODEL.RESNETS.NUM_GROUPS": _COUNT,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _COUNT,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _COUNT,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _COUNT,
    "MODEL.RETINANET.NUM_CLASSES": _COUNT,
    "MODEL.RETINANET.NUM_CONVS": _NUMBER,
    "MODEL.RETINANET.PRIOR_PROB": _within(0, 1),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": _between(0, 1),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _NUMBER,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NUMBER,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _between(0, 1),
    "MODEL.RETINANET.NMS_THRESH_TEST": _between(0, 1),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _COUNT,
    "MODEL.BN_FCOS.NUM_CLASSES": _COUNT,
    "MODEL.BN_FCOS.NUM_CONVS": _NUMBER,
    "MODEL.BN_FCOS.PRIOR_PROB": _within(0, 1),
    "MODEL.BN_FCOS.CENTER_SAMPLING_RADIUS": _NUMBER,
    "MODEL.BN_FCOS.FOCAL_LOSS_ALPHA": _between(0, 1),
    "MODEL.BN_FCOS.FOCAL_LOSS_GAMMA": _NUMBER,
    "MODEL.BN_FCOS.SCORE_THRESH_TEST": _between(0, 1),
    "MODEL.BN_FCOS.NMS_THRESH_TEST": _between(0, 1),
    "MODEL.BN_FCOS.TOPK_CANDIDATES_TEST": _COUNT,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _between(0, 1),
    "MODEL.RPN.NMS_THRESH": _between(0, 1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.ROI_HEADS.NUM_CLASSES": _COUNT,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _between(0, 1),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _between(0, 1),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _between(0, 1),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _NUMBER,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _NUMBER,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _COUNT,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _NUMBER,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _NUMBER,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _NUMBER,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _COUNT,
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": _NUMBER,
    "SOLVER.BASE_LR": _above(0),
    "SOLVER.BIAS_LR_FACTOR": _NUMBER,
    "SOLVER.MOMENTUM": _below(0, 1),
    "SOLVER.WEIGHT_DECAY": _NUMBER,
    "SOLVER.WEIGHT_DECAY_NORM": _NUMBER,
    "SOLVER.WEIGHT_DECAY_BIAS": _optional(_NUMBER),
    "SOLVER.GAMMA": _above(0),
    "SOLVER.STEPS": _each(_NUMBER, int),
    "SOLVER.WARMUP_ITERS": _NUMBER,
    "SOLVER.WARMUP_FACTOR": _between(0, 1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _above(0),
    "TEST.EVAL_PERIOD": _NUMBER,
    "TEST.DETECTIONS_PER_IMAGE": _COUNT,
}


def check_ranges(cfg: CfgNode) -> None:
    """Raise InputError for a number that is not finite, and for what RANGES does not accept."""
    values = dict(_leaves(cfg))
    for key, value in values.items():
        if not _is_finite(value):
            raise InputError(f"{key}: {value!r} is not accepted; use numbers that are finite")
        rule = RANGES.get(key, _ANY)
        if not rule.accepts(value):
            raise InputError(f"{key}: {value!r} is not accepted; use {rule.words}")
    mean, std = (values.get(f"MODEL.PIXEL_{of}", ()) for of in ("MEAN", "STD"))
    if len(mean) != len(std):
        raise InputError(
            f"MODEL.PIXEL_STD: {std!r} is not accepted with MODEL.PIXEL_MEAN {mean!r}; use as many "
            "values, one for each channel"
        )


def _leaves(node: CfgNode, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, CfgNode):
            yield from _leaves(value, name)
        else:
            yield name, value


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
