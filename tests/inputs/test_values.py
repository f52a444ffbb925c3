"""Values of the hosts' keys and what they get: a row for each kind, on both hosts."""

import math

import pytest

from bn_det.config.keys import add_bn_det_config
from bn_det.config.ranges import RANGES, check_ranges
from bn_det.data.coco import registered_sources
from bn_det.errors import InputError, one_line
from hosts import every_host, make_cfg
from reference import BASE

REFUSED = {
    "VERSION": ["3"],
    "SEED": ["-2", "4294967296", "9" * 30],
    "OUTPUT_DIR": ["", "s3://bucket/run", "http://host/run", r"'a\ud800'", r"'a\0b'"],
    "DATASETS.TRAIN": ["(1,)", "(None,)", r"('\ud800',)"],
    "DATASETS.SOURCES": ["[['', 'x']]", "[['a', '']]"],
    "DATALOADER.NUM_WORKERS": ["-1", "1000000"],
    "INPUT.FORMAT": ["XYZ"],
    "INPUT.MASK_FORMAT": ["rle"],
    "INPUT.MIN_SIZE_TRAIN": ["()", "(-1,)", "('a',)", "(1.5,)", "(True,)", "(1000000,)"],
    "INPUT.MAX_SIZE_TRAIN": ["0"],
    "MODEL.PIXEL_MEAN": ["[]", "[1.0, 2.0]"],
    "MODEL.RPN.IOU_THRESHOLDS": ["[]", "[-0.1, 0.5]", "[0.5, 0.4]", "['a', 'b']"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": ["[]", "[-0.5]"],
    "MODEL.PIXEL_STD": ["[0.0, 1.0, 1.0]", "[1.0, 2.0]", "[1e400, 1.0, 1.0]", "['a', 1.0, 1.0]"],
    "MODEL.ANCHOR_GENERATOR.SIZES": ["[]", "[[]]", "[[-3]]", "[3, -1]", "[3, [4]]", "[['a']]"],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ["[[0.0]]"],
    "MODEL.BACKBONE.FREEZE_AT": ["-1"],
    "MODEL.FPN.OUT_CHANNELS": ["0", "1000000000"],
    "MODEL.RESNETS.DEPTH": ["19"],
    "MODEL.RESNETS.RES2_OUT_CHANNELS": ["16"],
    "MODEL.BN_FCOS.NUM_CLASSES": ["0", "1000000000"],
    "MODEL.BN_FCOS.NUM_CONVS": ["-1", "1000000000"],
    "MODEL.BN_FCOS.PRIOR_PROB": ["1.0"],
    "MODEL.RETINANET.NUM_CLASSES": ["0", "1000000000"],
    "MODEL.RETINANET.NUM_CONVS": ["-1", "1000000000"],
    "MODEL.RETINANET.SCORE_THRESH_TEST": ["1.5", "-0.1"],
    "SOLVER.ACCUMULATE": ["0", "1000000000"],
    "SOLVER.MAX_ITER": ["0", "-3", "9223372036854775807"],
    "SOLVER.IMS_PER_BATCH": ["0", "1000000"],
    "SOLVER.VIRTUAL_IMAGES": ["-1", "1000000"],
    "SOLVER.CHECKPOINT_PERIOD": ["0"],
    "SOLVER.BASE_LR": ["0", "-0.1", "1e400"],
    "SOLVER.MOMENTUM": ["1.0", "-0.1"],
    "SOLVER.WEIGHT_DECAY": ["-1.0", "1e400"],
    "SOLVER.GAMMA": ["0.0"],
    "SOLVER.STEPS": ["('a',)", "(-1,)", "(1.5,)"],
    "SOLVER.WARMUP_ITERS": ["-5"],
    "SOLVER.WARMUP_FACTOR": ["1.5"],
    "TEST.DETECTIONS_PER_IMAGE": ["0"],
    "TEST.PRECISE_BN.IMS_PER_BATCH": ["-1", "1000000"],
    "TEST.PRECISE_BN.NUM_ITER": ["0", "9223372036854775807"],
}


@every_host
@pytest.mark.parametrize("key", REFUSED)
def test_refused(host, key):
    for value in REFUSED[key]:
        with pytest.raises(InputError) as e:
            make_cfg(host, BASE, key, value)
        line = one_line(e.value)
        assert line.startswith(f"{key}: ") or key == "MODEL.PIXEL_MEAN" in line
        assert "not accepted" in line


@every_host
def test_not_finite(host):
    """As YAML can say it, in whatever key."""
    for value in (math.nan, math.inf):
        cfg = make_cfg(host, BASE)
        cfg.SOLVER.BASE_LR = value
        with pytest.raises(InputError, match="SOLVER.BASE_LR: .* use numbers that are finite"):
            check_ranges(cfg)


@every_host
def test_the_name_of_another_data_set(host):
    """It would be trained on, or evaluated, in the place of the one that the name is known for."""
    for name in ("shapes_val", "coco_2017_val"):
        cfg = make_cfg(host, BASE, "DATASETS.REGISTER_COCO", repr([[name, "mine.json", "images"]]))
        words = f"{name}' is not accepted for mine.json: it is the name of the data set of .*/inst"
        with pytest.raises(InputError, match=words):
            registered_sources(cfg)


def test_the_name_of_a_data_set_in_the_catalog(tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.data import DatasetCatalog

    from bn_det.d2 import register_datasets

    DatasetCatalog.register("somebodys", list)
    try:
        opts = ["DATASETS.REGISTER_COCO", "[['somebodys', 'mine.json', 'images']]"]
        with pytest.raises(
            InputError, match="'somebodys' is not accepted .* in DatasetCatalog; use"
        ):
            register_datasets(make_cfg("detectron2", BASE, *opts))
    finally:
        DatasetCatalog.remove("somebodys")


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.RETINANET.IOU_THRESHOLDS", "[0.5, 0.4]"],
        ["MODEL.RETINANET.IOU_THRESHOLDS", "[0.0, 0.4]"],
        ["MODEL.RETINANET.IOU_LABELS", "[0, 1]"],
        ["MODEL.RETINANET.IOU_LABELS", "[0, 2, 1]"],
        ["INPUT.CROP.SIZE", "[2, -1]", "INPUT.CROP.ENABLED", "True"],
        ["INPUT.CROP.SIZE", "[0.5, 1.5]", "INPUT.CROP.ENABLED", "True"],
        ["INPUT.CROP.SIZE", "[0.5]", "INPUT.CROP.ENABLED", "True"],
        ["INPUT.CROP.SIZE", "[9, 3]", "INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE",
         "absolute_range"],
        ["INPUT.CROP.TYPE", "some"],
    ],
)  # fmt: skip
def test_detectron2_alone(opts):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    with pytest.raises(InputError, match=f"^{opts[0]}: .*not accepted"):
        make_cfg("detectron2", BASE, *opts)
    for size, kind in (("[0.9, 1.0]", "relative_range"), ("[100, 200]", "absolute")):
        crop = ["INPUT.CROP.SIZE", size, "INPUT.CROP.TYPE", kind, "INPUT.CROP.ENABLED", "True"]
        make_cfg("detectron2", BASE, *crop)


def test_every_rule_is_of_a_key():
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    known = set()

    def walk(node, path):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                known.add(f"{path}{key}")

    cfg = detectron2.get_cfg()
    add_bn_det_config(cfg)
    walk(cfg, "")
    assert RANGES.keys() <= known


def test_a_name_of_two_data_sets():
    cfg = make_cfg("torchvision", BASE)
    cfg.DATASETS.REGISTER_COCO = [["a", "a.json", "images"], ["a", "a.json", "images"]]
    assert list(registered_sources(cfg)) == ["a"]
    cfg.DATASETS.REGISTER_COCO[1][1] = "b.json"
    with pytest.raises(InputError, match="REGISTER_COCO: 'a' stands there twice, of other files"):
        registered_sources(cfg)
