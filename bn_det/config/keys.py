"""Our config keys, on any yacs CfgNode."""

from __future__ import annotations

from yacs.config import CfgNode

from ..errors import InputError
from ..training.agc import PREDICTORS
from .parts import LEVEL_PARTS, PARTS

_DETECTRON2 = (
    *("MODEL", *(f"MODEL.{part}" for part in PARTS if part != "BN_FCOS")),
    *("SOLVER", "TEST", "TEST.PRECISE_BN", "DATASETS", "DATALOADER"),
)
"""The nodes of Detectron2 that have keys of ours."""


def add_bn_det_config(cfg: CfgNode) -> None:
    """Add the keys of bn_det to a config that has Detectron2's, in place.

    What is there stays: keys of other projects, and ours with their values, so that a second call
    changes nothing. Other projects may add theirs before or after it.

    Raises:
        InputError: a key of ours is there with a value of another type, a node of Detectron2 is
            not there, or one that lacks a key is frozen; the config is as it was.
    """
    ours = our_keys(type(cfg))
    _check_fit(ours, cfg)
    _add_missing(ours, cfg)


def check_keys(cfg: CfgNode) -> None:
    """Raise InputError unless a config has all keys of ours."""
    _check_there(our_keys(), cfg)


def our_keys(node: type[CfgNode] = CfgNode) -> CfgNode:
    """The keys of bn_det alone, with their defaults, below the nodes of Detectron2."""
    cfg = node()
    for path in _DETECTRON2:
        *above, name = path.split(".")
        parent = cfg
        for step in above:
            parent = parent[step]
        parent[name] = node()

    # The head of the RPN that is named "BNRPNHead".
    cfg.MODEL.RPN.NORM = ""

    # FCOS, with the defaults of Detectron2's configs/common/models/fcos.py. MODEL.FCOS is
    # AdelaiDet's, which replaces what is there.
    cfg.MODEL.BN_FCOS = node()
    cfg.MODEL.BN_FCOS.NUM_CLASSES = 80
    cfg.MODEL.BN_FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.BN_FCOS.NUM_CONVS = 4
    cfg.MODEL.BN_FCOS.NORM = "GN"
    cfg.MODEL.BN_FCOS.PRIOR_PROB = 0.01
    # within so many strides of a box's center a position is positive
    cfg.MODEL.BN_FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.BN_FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.BN_FCOS.FOCAL_LOSS_GAMMA = 2.0
    # of the root of class score times centerness
    cfg.MODEL.BN_FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.BN_FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.BN_FCOS.NMS_THRESH_TEST = 0.6

    # For NORM "GhostBN": how many samples (images, or RoIs in a RoI head) are normalized together,
    # and which: "contiguous" or "random".
    for part in PARTS:
        cfg.MODEL[part].GHOST_SIZE = 0
        cfg.MODEL[part].GHOST_ORDER = "contiguous"

    # What normalizes the weights of a part's hidden layers: "WS", "ScaledWS" or "WN"; "" for
    # nothing. See bn_det.normalize_weight.
    for part in PARTS:
        cfg.MODEL[part].WEIGHT_NORM = ""

    # The probability of dropout before the final predictors.
    cfg.MODEL.RETINANET.DROPOUT = 0.0
    cfg.MODEL.ROI_BOX_HEAD.DROPOUT = 0.0

    # The normalizer-free net of the backbones build_nf_resnet_fpn_backbone and
    # build_nf_retinanet_resnet_fpn_backbone, by its name in timm. MODEL.RESNETS does not apply.
    cfg.MODEL.NF = node()
    cfg.MODEL.NF.NAME = "nf_resnet50"
    # Weights to begin with: "timm" for those that timm has published, a file of the state dict of
    # the whole net, or "" for random ones.
    cfg.MODEL.NF.PRETRAINED = ""
    # of the last block; that of the others rises to it
    cfg.MODEL.NF.DROP_PATH_RATE = 0.0

    # What the levels of a head share where its NORM is "BN", "SyncBN", "GhostBN" or "BRN": each
    # choice is "shared" or "per_domain" (per level). See bn_det.DomainBatchNorm2d. For the box head
    # with MODEL.ROI_HEADS.NAME "BNCascadeROIHeads": the level of a RoI is where it is pooled from.
    for part in (*LEVEL_PARTS, "ROI_BOX_HEAD"):
        default = "per_domain" if part in LEVEL_PARTS else "shared"
        cfg.MODEL[part].BN = node()
        # whose samples normalize in training
        cfg.MODEL[part].BN.STATISTICS = default
        # whose statistics are kept for test time
        cfg.MODEL[part].BN.POPULATION = default
        # whether levels share weight and bias
        cfg.MODEL[part].BN.AFFINE = "shared"

    # Parts whose BatchNorm has statistics for each source of images (DATASETS.SOURCES), and whether
    # sources share weight and bias in backbone and FPN. See bn_det.SourceBatchNorm2d.
    cfg.MODEL.BN_SOURCES = node()
    cfg.MODEL.BN_SOURCES.PARTS = []
    cfg.MODEL.BN_SOURCES.AFFINE = "shared"

    # Whether training mixes the RoIs of all processes before the head.
    cfg.MODEL.ROI_BOX_HEAD.SHUFFLE = False
    cfg.MODEL.ROI_MASK_HEAD.SHUFFLE = False

    # What normalizes in training: the statistics of the "batch", or those of the "population", in
    # the parts that are named; in all if none is. UPDATE_POPULATION: whether training updates them.
    cfg.SOLVER.BN_STATISTICS = "batch"
    cfg.SOLVER.BN_STATISTICS_PARTS = []
    cfg.SOLVER.UPDATE_POPULATION = True

    # The weight of a new batch in the EMA of the population statistics.
    cfg.SOLVER.BN_MOMENTUM = 0.1

    # Batches of IMS_PER_BATCH images for each step of the optimizer and of the schedule, which add
    # up their gradients. MAX_ITER and all other numbers of iterations count steps.
    cfg.SOLVER.ACCUMULATE = 1

    # Adaptive gradient clipping, of all parameters but those that have one of EXCLUDE in their
    # names: the final predictors. See bn_det.training.agc.
    cfg.SOLVER.AGC = node()
    cfg.SOLVER.AGC.ENABLED = False
    cfg.SOLVER.AGC.CLIP_FACTOR = 0.01
    cfg.SOLVER.AGC.EPS = 0.001
    cfg.SOLVER.AGC.EXCLUDE = list(PREDICTORS)

    # Extra images in the normalization batches of a step, without gradient (Virtual BN); of all
    # processes together.
    cfg.SOLVER.VIRTUAL_IMAGES = 0

    # For NORM "BRN", batch renormalization: its limits, and the iterations up to which it is
    # batch normalization, and from which on they are reached (Ioffe 2017, Sec. 4.1).
    cfg.SOLVER.BRN = node()
    cfg.SOLVER.BRN.R_MAX = 3.0
    cfg.SOLVER.BRN.D_MAX = 5.0
    cfg.SOLVER.BRN.WARMUP_ITERS = 5000
    cfg.SOLVER.BRN.R_MAX_ITER = 40000
    cfg.SOLVER.BRN.D_MAX_ITER = 25000

    # Whether the processes' EMAs are averaged before evaluation and saving. Without it each
    # process evaluates with its own, and those of process 0 are saved.
    cfg.SOLVER.AVERAGE_BN_STATISTICS = True

    # Seconds that a process waits for the others in a layer over processes (SyncBN, SHUFFLE); 0.0
    # not to find out whether all are in the same layer. See bn_det.name_layers.
    cfg.SOLVER.SYNC_BN_TIMEOUT = 300.0

    # From which iteration on BatchNorm is frozen in training; 0 for never. FREEZE_BN_MODULES: in
    # which modules, by names or patterns of names, with FREEZE_BN_ITER 0 from the start; [] for
    # all.
    # FREEZE_BN_AFFINE: weight and bias, too. FREEZE_BN_PRECISE: with statistics that PreciseBN
    # recomputes right before, but at the start.
    cfg.SOLVER.FREEZE_BN_ITER = 0
    cfg.SOLVER.FREEZE_BN_MODULES = []
    cfg.SOLVER.FREEZE_BN_AFFINE = False
    cfg.SOLVER.FREEZE_BN_PRECISE = True

    # Whether frozen BatchNorm, FrozenBN too, is computed by the convolution before it: the same
    # training with less memory and time. See bn_det.tune.
    cfg.SOLVER.TUNE_BN = False

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

    # Images of so many categories in a process's batch, as many of each, instead of any; 0 for any.
    # See bn_det.data.CategoryBatches.
    cfg.DATALOADER.CATEGORIES_PER_BATCH = 0

    # Sources of images (labs, sensors): a list of [source, data set, data set, ...].
    cfg.DATASETS.SOURCES = []
    return cfg


def _check_fit(ours: CfgNode, cfg: CfgNode, prefix: str = "") -> None:
    for name, default in ours.items():
        key = prefix + name
        if name not in cfg:
            if key in _DETECTRON2:
                raise InputError(
                    f"add_bn_det_config: the config has no node {key}; it takes one with the keys "
                    "of Detectron2"
                )
            if cfg.is_frozen():
                raise InputError(
                    f"{key}: cannot be added to a frozen config; call add_bn_det_config before "
                    "freeze()"
                )
        elif isinstance(default, CfgNode) and isinstance(cfg[name], CfgNode):
            _check_fit(default, cfg[name], f"{key}.")
        elif _kind(cfg[name]) is not _kind(default):
            found, accepted = type(cfg[name]).__name__, _kind(default).__name__
            raise InputError(
                f"{key}: {cfg[name]!r} is there already, of type {found}, where bn_det has a key "
                f"of this name and of type {accepted}; use that type, or another name"
            )


def _kind(value: object) -> type:
    """The type of a value, or that with which yacs exchanges it."""
    if isinstance(value, CfgNode):
        return CfgNode
    return list if isinstance(value, tuple) else type(value)


def _add_missing(ours: CfgNode, cfg: CfgNode) -> None:
    for name, default in ours.items():
        if name not in cfg:
            cfg[name] = default
        elif isinstance(default, CfgNode):
            _add_missing(default, cfg[name])


def _check_there(ours: CfgNode, cfg: CfgNode, prefix: str = "") -> None:
    for name, default in ours.items():
        if not isinstance(cfg, CfgNode) or name not in cfg:
            raise InputError(
                f"{prefix}{name}: the config does not have this key of bn_det; call "
                "bn_det.add_bn_det_config(cfg) after what replaces nodes of the config"
            )
        if isinstance(default, CfgNode):
            _check_there(default, cfg[name], f"{prefix}{name}.")
