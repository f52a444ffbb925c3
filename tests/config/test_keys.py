"""Our keys beside those of other projects, on both hosts' configs."""

from fnmatch import fnmatch

import pytest

from bn_det import add_bn_det_config
from bn_det.config.keys import leaves, our_keys
from bn_det.config.load import load_config
from bn_det.config.ours import KEYS
from bn_det.config.ranges import check_ranges
from bn_det.config.rules import ANY
from bn_det.errors import InputError
from hosts import every_host, make_cfg
from reference import BASE

OURS = dict(leaves(our_keys()))
THEIRS = {
    **{"MODEL.FCOS.NUM_CLASSES": 11, "MODEL.FCOS.NORM": "SyncBN", "MODEL.FCOS.TOP_LEVELS": 2},
    **{"MODEL.FCOS.FPN_STRIDES": [8, 16], "MODEL.FCOS.SIZES_OF_INTEREST": [64, 128]},
    **{"MODEL.DLA.NORM": "FrozenBN", "SOLVER.WARMUP_NORM": 0.5},
}
"""Keys of a project, whose nodes MODEL.FCOS and MODEL.DLA it makes anew."""


def stock(host):
    """A config as a host has it without us."""
    if host == "torchvision":
        from fvcore.common.config import CfgNode

        from bn_det.tv.config import _DEFAULTS

        return CfgNode(_DEFAULTS)
    from detectron2.config import get_cfg

    return get_cfg()


def set_key(cfg, key, value):
    *path, name = key.split(".")
    for step in path:
        cfg = cfg[step]
    cfg[name] = value


def add_theirs(cfg):
    cfg.MODEL.FCOS, cfg.MODEL.DLA = type(cfg)(), type(cfg)()
    for key, value in THEIRS.items():
        set_key(cfg, key, value)


@every_host
@pytest.mark.parametrize("order", ["ours", "theirs"])
def test_both_orders_keep_all_keys(host, order, tmp_path):
    cfg = stock(host)
    expected = {**dict(leaves(cfg)), **THEIRS, **OURS}
    adds = [add_bn_det_config, add_theirs]
    for add in adds if order == "ours" else reversed(adds):
        add(cfg)
    assert dict(leaves(cfg)) == expected
    path = tmp_path / "theirs.yaml"
    path.write_text("MODEL:\n  FCOS:\n    NORM: BN\n    TOP_LEVELS: 0\n")
    load_config(cfg, str(path), ["MODEL.BN_FCOS.NUM_CONVS", "2"], host)
    assert (cfg.MODEL.FCOS.NORM, cfg.MODEL.FCOS.TOP_LEVELS) == ("BN", 0)
    assert (cfg.MODEL.BN_FCOS.NORM, cfg.MODEL.BN_FCOS.NUM_CONVS) == ("GN", 2)


@every_host
def test_what_is_there_stays(host):
    """A key of ours that a project has, and its nodes of our names."""
    cfg = stock(host)
    cfg.MODEL.RPN.NORM = "LN"
    cfg.MODEL.BN_SOURCES = type(cfg)({"PARTS": ("FPN",), "LAB": "a"})
    cfg.SOLVER.BRN = type(cfg)({"R_MAX": 7.0})
    there = dict(leaves(cfg))
    add_bn_det_config(cfg)
    assert dict(leaves(cfg)) == {**OURS, **there}


@every_host
def test_twice(host):
    cfg = make_cfg(host, BASE, "SOLVER.BN_MOMENTUM", "0.3", "MODEL.NF.NAME", "mine")
    cfg.freeze()
    before = cfg.dump()
    add_bn_det_config(cfg)
    assert cfg.dump() == before and cfg.SOLVER.BN_MOMENTUM == 0.3


@every_host
def test_a_part_that_is_frozen(host):
    cfg = stock(host)
    cfg.SOLVER.freeze()
    before = cfg.dump()
    with pytest.raises(InputError, match=r"SOLVER.\w+: cannot be added to a frozen config"):
        add_bn_det_config(cfg)
    assert cfg.dump() == before


@pytest.mark.parametrize("key", [*OURS, "MODEL.NF", "SOLVER.AGC", "MODEL.RPN.BN"])
def test_another_type_is_refused(key):
    cfg = stock("torchvision")
    default = OURS.get(key)
    value = 3 if isinstance(default, str) else "three"
    # The nodes that are ours alone.
    *path, _ = key.split(".")
    node = cfg
    for step in path:
        if step not in node:
            node[step] = type(cfg)()
        node = node[step]
    set_key(cfg, key, value)
    before = cfg.dump()
    with pytest.raises(InputError) as e:
        add_bn_det_config(cfg)
    found, accepted = type(value).__name__, "CfgNode" if default is None else type(default).__name__
    assert str(e.value).startswith(f"{key}: {value!r} is there already, of type {found},")
    assert f"of type {accepted};" in str(e.value)
    assert cfg.dump() == before


def test_a_node_in_place_of_a_value_is_refused():
    cfg = stock("torchvision")
    cfg.MODEL.RPN.NORM = type(cfg)()
    with pytest.raises(InputError, match="MODEL.RPN.NORM: .* is there already, of type CfgNode"):
        add_bn_det_config(cfg)


def test_another_config_is_refused():
    cfg = stock("torchvision")
    del cfg.TEST["PRECISE_BN"]
    before = cfg.dump()
    with pytest.raises(InputError, match="no node TEST.PRECISE_BN; .*keys of Detectron2"):
        add_bn_det_config(cfg)
    assert cfg.dump() == before


@every_host
@pytest.mark.parametrize("value", [{}, False])
def test_ours_replaced_afterwards(host, value):
    """Found before anything is loaded; adding them once more mends it."""
    cfg = make_cfg(host, BASE)
    cfg.MODEL.NF = type(cfg)(value) if isinstance(value, dict) else value
    message = "MODEL.NF.NAME: the config does not have this key of bn_det; .*add_bn_det_config"
    with pytest.raises(InputError, match=message):
        load_config(cfg, BASE, [], host)
    if value is not False:
        add_bn_det_config(cfg)
        load_config(cfg, BASE, [], host)
        assert cfg.MODEL.NF.NAME == "nf_resnet50"


@every_host
def test_the_name_that_our_fcos_had(host, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("MODEL:\n  FCOS:\n    NORM: BN\n")
    with pytest.raises(InputError, match="key: MODEL.FCOS .*bn_det is MODEL.BN_FCOS"):
        make_cfg(host, path)
    with pytest.raises(InputError, match="MODEL.FCOS.NORM: 'BN' .*bn_det is MODEL.BN_FCOS"):
        make_cfg(host, BASE, "MODEL.FCOS.NORM", "BN")


REFUSED = {
    "MODEL.BN_FCOS.NUM_CLASSES": 0,
    "MODEL.BN_FCOS.IN_FEATURES": [3],
    "MODEL.BN_FCOS.NUM_CONVS": -1,
    "MODEL.BN_FCOS.PRIOR_PROB": 1.0,
    "MODEL.BN_FCOS.CENTER_SAMPLING_RADIUS": -0.5,
    "MODEL.BN_FCOS.FOCAL_LOSS_ALPHA": 1.5,
    "MODEL.BN_FCOS.FOCAL_LOSS_GAMMA": -1.0,
    "MODEL.BN_FCOS.SCORE_THRESH_TEST": -0.1,
    "MODEL.BN_FCOS.TOPK_CANDIDATES_TEST": 0,
    "MODEL.BN_FCOS.NMS_THRESH_TEST": 2.0,
    "MODEL.*.GHOST_SIZE": -1,
    "MODEL.*.GHOST_ORDER": "sorted",
    "MODEL.*.WEIGHT_NORM": "BN",
    "MODEL.*.DROPOUT": 1.0,
    "MODEL.NF.NAME": "",
    "MODEL.NF.DROP_PATH_RATE": -0.1,
    "MODEL.*.BN.*": "both",
    "MODEL.BN_SOURCES.PARTS": ["ROI_BOX_HEAD"],
    "MODEL.BN_SOURCES.AFFINE": "none",
    "*.BN_STATISTICS": "ema",
    "*.BN_STATISTICS_PARTS": ["HEAD"],
    "SOLVER.BN_MOMENTUM": 0.0,
    "SOLVER.ACCUMULATE": 0,
    "SOLVER.AMP.DTYPE": "half",
    "SOLVER.AGC.CLIP_FACTOR": 0.0,
    "SOLVER.AGC.EPS": 0.0,
    "SOLVER.AGC.EXCLUDE": [1],
    "SOLVER.VIRTUAL_IMAGES": -1,
    "SOLVER.BRN.R_MAX": 0.9,
    "SOLVER.BRN.D_MAX": -0.1,
    "SOLVER.BRN.*_ITER*": -1,
    "SOLVER.SYNC_BN_TIMEOUT": -1.0,
    "SOLVER.FREEZE_BN_ITER": -1,
    "SOLVER.FREEZE_BN_MODULES": [None],
    "TEST.BN_MONITOR": 1,
    "TEST.PRECISE_BN.TOLERANCE": -0.1,
    "TEST.PRECISE_BN.ESTIMATOR": "ema",
    "TEST.PRECISE_BN.IMS_PER_BATCH": -1,
    "DATASETS.REGISTER_COCO": ["coco"],
    "DATALOADER.CATEGORIES_PER_BATCH": -1,
    "DATASETS.SOURCES": ["lab"],
}
"""For each key of ours whose type is not all that is asked, a value that is not accepted."""


def refused_value(key):
    found = [value for pattern, value in REFUSED.items() if fnmatch(key, pattern)]
    return found[0] if found else None


@pytest.mark.parametrize("key", KEYS)
def test_the_values_of_a_key(key):
    described = KEYS[key]
    assert described.rule.accepts(described.default) and described.meaning
    value = refused_value(key)
    if value is None:
        assert type(described.default) is bool or described.rule is ANY
        return
    cfg = our_keys()
    set_key(cfg, key, value)
    with pytest.raises(InputError) as e:
        check_ranges(cfg)
    assert str(e.value) == f"{key}: {value!r} is not accepted; use {described.rule.words}"


@every_host
@pytest.mark.parametrize(
    "key, accepted",
    [
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("INPUT.RANDOM_FLIP", "horizontal"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
    ],
)
def test_names_of_detectron2(host, key, accepted):
    """Whatever its own error would be, and of the host that has the key."""
    try:
        make_cfg(host, BASE, key, accepted)
    except InputError as e:
        assert host == "torchvision" and "Non-existent key" in str(e)
        return
    words = f"{key}: 'other' is not accepted; use one of .*{accepted}"
    with pytest.raises(InputError, match=words):
        make_cfg(host, BASE, key, "other")


@every_host
def test_parts_that_freeze_are_not_evaluated_by_their_batch(host):
    batch = "TEST.BN_STATISTICS", "batch"
    for key, value in (("FREEZE_BN_ITER", "5"), ("FREEZE_BN_MODULES", "('backbone*',)")):
        with pytest.raises(InputError, match=f"SOLVER.{key}: .* 'batch': frozen layers normalize"):
            make_cfg(host, BASE, f"SOLVER.{key}", value, *batch)
