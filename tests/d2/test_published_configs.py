"""The configs for COCO against those that Detectron2 has."""

import pytest

pytest.importorskip("detectron2")

from pathlib import Path

import detectron2.config

from bn_det.config.keys import leaves
from bn_det.config.load import load_config
from bn_det.d2 import add_bn_det_config

CONFIGS = Path(__file__).parents[2] / "configs"
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
NAMES = {"MODEL.BACKBONE.NAME", "MODEL.ROI_BOX_HEAD.NAME", "MODEL.ROI_MASK_HEAD.NAME"}
BOX_HEAD = {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"}


def differences(ours, theirs):
    """The keys that two config files set differently, and the merged values of both."""
    merged = []
    for file in (CONFIGS / ours, ZOO / theirs):
        cfg = detectron2.config.get_cfg()
        add_bn_det_config(cfg)
        load_config(cfg, str(file), [], "Detectron2")
        merged.append(dict(leaves(cfg)))
    a, b = merged
    return {k for k in a if a[k] != b[k]} - {"OUTPUT_DIR"}, a


def test_bases():
    changed, _ = differences("Base-RCNN-FPN.yaml", "Base-RCNN-FPN.yaml")
    assert changed == NAMES
    changed, _ = differences("Base-RetinaNet.yaml", "Base-RetinaNet.yaml")
    assert changed == {"MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME"}


def test_leakage():
    mask_rcnn = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    changed, cfg = differences("leakage/head_none.yaml", mask_rcnn)
    assert changed == NAMES | BOX_HEAD
    assert (cfg["MODEL.ROI_BOX_HEAD.NUM_CONV"], cfg["MODEL.ROI_BOX_HEAD.NUM_FC"]) == (4, 1)
    assert cfg["MODEL.BACKBONE.FREEZE_AT"] == 2 and cfg["MODEL.RESNETS.NORM"] == "FrozenBN"


@pytest.mark.parametrize("norm", ["GN", "SyncBN"])
def test_from_scratch(norm):
    theirs = "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
    changed, _ = differences(f"leakage/scratch_{norm}.yaml", theirs)
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    norms = {f"MODEL.{part}.NORM" for part in parts} if norm != "GN" else set()
    assert changed == NAMES | norms


def test_multi_domain():
    theirs = "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
    changed, cfg = differences("multi_domain/per_domain-per_domain-shared.yaml", theirs)
    ours = {"MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.RETINANET.NORM"}
    assert changed == ours | {"TEST.PRECISE_BN.ENABLED"}
    assert cfg["MODEL.RETINANET.NORM"] == "SyncBN" and cfg["SOLVER.BASE_LR"] == 0.01
