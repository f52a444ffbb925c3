"""Our config keys: what each is by default, what it has to be, what it is for, and what reads it.

From this come the keys themselves (``keys.py``), the checks of single values (``ranges.py``), what
is said of keys that nothing reads (``unread.py``) and the table in configs/README.md. What is only
wrong together with other keys is in ``check.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..layers import SHARING, WEIGHT_NORMS
from ..layers.batch_norm import STATISTICS
from ..layers.ghost import GHOST_ORDERS
from ..layers.meeting import TIMEOUT, TIMEOUTS, is_timeout
from ..population.estimate import ESTIMATORS
from ..training.agc import PREDICTORS
from ..training.mixed_precision import DTYPES
from ..training.monitor import PERIOD
from .parts import LEVEL_PARTS, PARTS, SOURCE_PARTS
from .rules import (
    ANY,
    CLASSES,
    COUNT,
    LAYERS,
    NAMES,
    NUMBER,
    Rule,
    above,
    at_least,
    below,
    between,
    each,
    one_of,
    some_of,
    within,
)

MODEL, HOOKS, TRAINER, DATA = "the model", "our hooks", "our trainers", "the data"
"""What reads keys. Hooks work in any trainer of Detectron2 that has BNHooks."""

_LISTS = each(ANY, (list, tuple)).accepts
_FLAG, _SHARING = one_of(True, False), one_of(*SHARING)


class Key(NamedTuple):
    """A config key.

    Attributes:
        default: its type is that of all values; an integer for a float is taken.
        rule: what a value has to be.
        meaning: for docs.
        reader: what reads it.
    """

    default: Any
    rule: Rule
    meaning: str
    reader: str = MODEL


_GHOST_SIZE = Key(
    0,
    NUMBER,
    "for NORM `GhostBN`: how many samples (images; RoIs in a RoI head) are normalized together",
)
_GHOST_ORDER = Key("contiguous", one_of(*GHOST_ORDERS), "for NORM `GhostBN`: which samples")
_WEIGHT_NORM = Key(
    "",
    one_of("", *WEIGHT_NORMS),
    "what normalizes the weights of the part's hidden layers: weight standardization (of "
    "convolutions that a norm follows), the scaled one, which keeps the variance without a norm "
    "(not in `RESNETS`), or weight normalization (`bn_det.normalize_weight`)",
)
_DROPOUT = Key(0.0, below(0.0, 1.0), "probability of dropout before the final predictors")
_SHUFFLE = Key(False, _FLAG, "whether training mixes the RoIs of all processes before the head")
_SHARED_BY_LEVELS = {
    "STATISTICS": "where NORM is `BN`, `SyncBN`, `GhostBN` or `BRN`: whose samples normalize in "
    "training, those of all levels, or of each",
    "POPULATION": "whose statistics are kept for test time. It does not follow STATISTICS: change "
    "both for a head that is consistent",
    "AFFINE": "whether levels share weight and bias",
}
_OF_BOX_HEAD = (
    ". With `MODEL.ROI_HEADS.NAME BNCascadeROIHeads` a RoI's level is where it is pooled from"
)


def _sharing(part: str) -> dict[str, Key]:
    of_levels = part in LEVEL_PARTS
    return {
        f"MODEL.{part}.BN.{name}": Key(
            "per_domain" if of_levels and name != "AFFINE" else "shared",
            _SHARING,
            meaning if of_levels else meaning + _OF_BOX_HEAD,
        )
        for name, meaning in _SHARED_BY_LEVELS.items()
    }


def _fcos() -> dict[str, Key]:
    """With the defaults of Detectron2's configs/common/models/fcos.py.

    MODEL.FCOS is AdelaiDet's, which replaces what is there.
    """
    radius = "within so many strides of a box's center a position is positive"
    score = "least score of a detection: the root of class score times centerness"
    keys = {
        "NUM_CLASSES": Key(80, CLASSES, "categories"),
        "IN_FEATURES": Key(["p3", "p4", "p5", "p6", "p7"], NAMES, "feature levels"),
        "NUM_CONVS": Key(4, LAYERS, "convolutions of each tower"),
        "NORM": Key("GN", ANY, "the normalization layer, as of every part"),
        "PRIOR_PROB": Key(0.01, within(0, 1), "score of a category before training"),
        "CENTER_SAMPLING_RADIUS": Key(1.5, NUMBER, radius),
        "FOCAL_LOSS_ALPHA": Key(0.25, between(0, 1), "of the focal loss"),
        "FOCAL_LOSS_GAMMA": Key(2.0, NUMBER, "of the focal loss"),
        "SCORE_THRESH_TEST": Key(0.2, between(0, 1), score),
        "TOPK_CANDIDATES_TEST": Key(1000, COUNT, "positions of a level that may be detections"),
        "NMS_THRESH_TEST": Key(0.6, between(0, 1), "IoU from which on a weaker box is dropped"),
    }
    return {f"MODEL.BN_FCOS.{name}": key for name, key in keys.items()}


KEYS: dict[str, Key] = {
    "MODEL.RPN.NORM": Key("", ANY, "the normalization layer of the head that is `BNRPNHead`"),
    **_fcos(),
    **{f"MODEL.{part}.GHOST_SIZE": _GHOST_SIZE for part in PARTS},
    **{f"MODEL.{part}.GHOST_ORDER": _GHOST_ORDER for part in PARTS},
    **{f"MODEL.{part}.WEIGHT_NORM": _WEIGHT_NORM for part in PARTS},
    **{f"MODEL.{part}.DROPOUT": _DROPOUT for part in ("RETINANET", "ROI_BOX_HEAD")},
    "MODEL.NF.NAME": Key(
        "nf_resnet50",
        Rule(bool, "timm's name of a net"),
        "the normalizer-free net of the backbones `build_nf_resnet_fpn_backbone` and "
        "`build_nf_retinanet_resnet_fpn_backbone`, by its name in timm; `MODEL.RESNETS` does not "
        "apply",
    ),
    "MODEL.NF.PRETRAINED": Key(
        "",
        ANY,
        "weights to begin with: `timm` for those that timm has published, a file of the state dict "
        "of the whole net, or nothing for random ones",
    ),
    "MODEL.NF.DROP_PATH_RATE": Key(
        0.0, below(0.0, 1.0), "stochastic depth of the last block, to which that of others rises"
    ),
    **{k: v for part in (*LEVEL_PARTS, "ROI_BOX_HEAD") for k, v in _sharing(part).items()},
    "MODEL.BN_SOURCES.PARTS": Key(
        [],
        some_of(SOURCE_PARTS),
        "parts whose BN has statistics for each source of images (`DATASETS.SOURCES`)",
    ),
    "MODEL.BN_SOURCES.AFFINE": Key(
        "shared",
        _SHARING,
        "whether sources share weight and bias in backbone and FPN (in RetinaNet's head "
        "`RETINANET.BN.AFFINE` says it)",
    ),
    "MODEL.ROI_BOX_HEAD.SHUFFLE": _SHUFFLE,
    "MODEL.ROI_MASK_HEAD.SHUFFLE": _SHUFFLE,
    "SOLVER.BN_STATISTICS": Key(
        "batch",
        one_of(*STATISTICS),
        "what normalizes in training; no gradient flows through the population's",
    ),
    "SOLVER.BN_STATISTICS_PARTS": Key(
        [], some_of(PARTS), "where `population` normalizes; everywhere if it is empty"
    ),
    "SOLVER.UPDATE_POPULATION": Key(
        True, _FLAG, "whether training updates the population statistics"
    ),
    "SOLVER.BN_MOMENTUM": Key(
        0.1,
        Rule(lambda value: 0 < value <= 1, "more than 0.0, and 1.0 at most"),
        "the weight of a new batch in the EMA of the population statistics (for `BN`, `SyncBN`, "
        "`GhostBN`, `BRN`)",
    ),
    "SOLVER.ACCUMULATE": Key(
        1,
        between(1, 10_000),
        "batches of `IMS_PER_BATCH` images for a step of the optimizer and of the schedule, whose "
        "gradients add up; all numbers of iterations count steps",
        TRAINER,
    ),
    "SOLVER.AMP.DTYPE": Key(
        "float16",
        one_of(*DTYPES),
        "what training computes in with `SOLVER.AMP.ENABLED`, mixed precision, where autocast has "
        "it do so; gradients of `float16` are scaled. Evaluation is in float32",
        TRAINER,
    ),
    "SOLVER.AGC.ENABLED": Key(False, _FLAG, "adaptive gradient clipping", TRAINER),
    "SOLVER.AGC.CLIP_FACTOR": Key(
        0.01, above(0.0), "a gradient's norm in units of its weight's, at most", TRAINER
    ),
    "SOLVER.AGC.EPS": Key(0.001, above(0.0), "the least norm of a weight there", TRAINER),
    "SOLVER.AGC.EXCLUDE": Key(
        list(PREDICTORS),
        NAMES,
        "parts of the names of parameters that are not clipped: the final predictors",
        TRAINER,
    ),
    "SOLVER.VIRTUAL_IMAGES": Key(
        0,
        between(0, 2**16),
        "extra images of all processes in the normalization batches of a step, without gradient "
        "(Virtual BN)",
        HOOKS,
    ),
    "SOLVER.BRN.R_MAX": Key(
        3.0,
        at_least(1.0),
        "for NORM `BRN`, batch renormalization: its limit of the ratio of standard deviations",
    ),
    "SOLVER.BRN.D_MAX": Key(5.0, at_least(0.0), "its limit of the difference of means"),
    "SOLVER.BRN.WARMUP_ITERS": Key(5000, NUMBER, "iterations of plain BN", HOOKS),
    "SOLVER.BRN.R_MAX_ITER": Key(40000, NUMBER, "when R_MAX is reached", HOOKS),
    "SOLVER.BRN.D_MAX_ITER": Key(25000, NUMBER, "when D_MAX is reached", HOOKS),
    "SOLVER.AVERAGE_BN_STATISTICS": Key(
        True,
        _FLAG,
        "whether the processes' EMAs are averaged before evaluation and saving; without it each "
        "evaluates with its own, and those of process 0 are saved",
        HOOKS,
    ),
    "SOLVER.SYNC_BN_TIMEOUT": Key(
        TIMEOUT,
        Rule(is_timeout, TIMEOUTS),
        "how long a process waits for the others in `SyncBN` or `SHUFFLE`; then it ends with the "
        "layer and the processes that did not come",
        HOOKS,
    ),
    "SOLVER.FREEZE_BN_ITER": Key(
        0, at_least(0, "for never"), "the iteration from which on BN is frozen in training", HOOKS
    ),
    "SOLVER.FREEZE_BN_MODULES": Key(
        [],
        NAMES,
        "in which modules, by names or patterns of names, and with `FREEZE_BN_ITER 0` from the "
        "start; in all if it is empty: `\"('backbone.bottom_up.res[23]*',)\"`",
        HOOKS,
    ),
    "SOLVER.FREEZE_BN_AFFINE": Key(False, _FLAG, "whether weight and bias are frozen, too", HOOKS),
    "SOLVER.FREEZE_BN_PRECISE": Key(
        True, _FLAG, "whether statistics are recomputed right before, but at the start", HOOKS
    ),
    "SOLVER.TUNE_BN": Key(
        False,
        _FLAG,
        "whether frozen BN, `FrozenBN` too, is folded into the convolution's weight in each step: "
        "the same training, for less time where the device is busy (`bn_det.tune`)",
        HOOKS,
    ),
    "TEST.PRECISE_BN.TOLERANCE": Key(
        0.0,
        at_least(0.0, "for none"),
        "PreciseBN takes no more batches once the standard error of all statistics is below",
        HOOKS,
    ),
    "TEST.PRECISE_BN.ESTIMATOR": Key(
        "population_variance",
        one_of(*ESTIMATORS),
        "the variance of all values, or what an EMA estimates",
        HOOKS,
    ),
    "TEST.PRECISE_BN.IMS_PER_BATCH": Key(
        0,
        between(0, 2**16, "for as many as in training"),
        "images in such a batch, of all processes",
        HOOKS,
    ),
    "TEST.BN_MONITOR": Key(
        PERIOD,
        Rule(lambda value: value == 0 or value >= 2, "2 or more, or 0 for never"),
        "iterations between two looks at BatchNorm in training: metrics, and warnings of the "
        "doctor's rules (`bn_det.training.Monitor`)",
        HOOKS,
    ),
    "TEST.BN_STATISTICS": Key(
        "population",
        one_of(*STATISTICS),
        "what normalizes in evaluation; `batch` is the statistics of a test image's RoIs (in the "
        "backbone, of the image)",
    ),
    "TEST.BN_STATISTICS_PARTS": Key(
        [],
        some_of(PARTS),
        "where `batch` holds; everywhere if it is empty. At p7 a small image is one value, which "
        "has no variance: leave the head out, or have its levels share statistics",
    ),
    "DATASETS.REGISTER_COCO": Key(
        [],
        Rule(_LISTS, "a list of lists [name, JSON file, folder of images]"),
        "data sets of your own, to be named in `DATASETS.TRAIN` and `TEST`",
        DATA,
    ),
    "DATALOADER.CATEGORIES_PER_BATCH": Key(
        0,
        at_least(0, "for any"),
        "images of so many categories in a process's batch, as many of each",
        TRAINER,
    ),
    "DATASETS.SOURCES": Key(
        [],
        Rule(_LISTS, "a list of lists [source, data set, ...]"),
        "which data sets are of which source (lab, sensor)",
        DATA,
    ),
}
