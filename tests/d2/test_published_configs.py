"""The configs for COCO against those that Detectron2 has."""

import pytest

pytest.importorskip("detectron2")

from pathlib import Path

import detectron2.config
from omegaconf import DictConfig, OmegaConf
from torch import nn

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


PROJECT = Path(detectron2.__file__).parents[1] / "projects" / "Rethinking-BatchNorm" / "configs"
ROWS = {
    "leakage/head_BN": "mask_rcnn_BNhead",
    "leakage/head_BN_batch_stats": "mask_rcnn_BNhead_batch_stats",
    "leakage/head_BN_shuffle": "mask_rcnn_BNhead_shuffle",
    "leakage/head_SyncBN": "mask_rcnn_SyncBNhead",
    "multi_domain/per_domain-shared-shared": "retinanet_SyncBNhead",
    "multi_domain/shared-shared-shared": "retinanet_SyncBNhead_SharedTraining",
}
"""Our files and theirs, as their README has them. (Rows 2 and 4 of Table 5 are a script.)"""

OF_THEM = {
    "train.eval_period": (5000, 0),
    "train.checkpointer.max_to_keep": (100, None),
    "dataloader.train.mapper.use_instance_mask": (True, False),
}
"""What is not the same, theirs and ours: docs/published.md says what that does."""

COMPONENTS = {
    "model": "BNRetinaNet",
    "model.backbone": "build_fpn",
    "model.head": "BNRetinaNetHead",
    "model.roi_heads.box_head": "BNFastRCNNConvFCHead",
    "model.roi_heads.mask_head": "BNMaskRCNNConvUpsampleHead",
    "optimizer": "build_optimizer",
}
"""Ours, in the places of Detectron2's."""

OUR_OWN = (
    *("optimizer.", "train.seed", "train.amp.dtype", "dataloader.evaluator.output_dir"),
    *(".weight_norm", ".dropout", ".shuffle", "norm.", ".input_shape.", "model.smooth_l1_beta"),
    "dataloader.test.mapper.augmentations.0.sample_style",
)
"""In parts of names: what a file of theirs has not, and which is at its default or is our norm."""


def lazily(path):
    """All values of a LazyConfig file by their keys, functions and classes by their names."""
    values = {}

    def add(key, value):
        if isinstance(value, (dict, list)):
            names = value if isinstance(value, dict) else range(len(value))
            for name in names:
                add(f"{key}.{name}" if key else str(name), value[name])
        else:
            is_name = isinstance(value, str) and key.endswith("_target_")
            name = value.rpartition(".")[2] if is_name else value
            values[key] = getattr(value, "__qualname__", name)

    nodes = detectron2.config.LazyConfig.load(str(path))
    for name, node in nodes.items():
        if isinstance(node, DictConfig):
            add(name, OmegaConf.to_container(node, resolve=True))
    return values


@pytest.mark.skipif(
    not PROJECT.is_dir(), reason="there is no checkout of Detectron2 with projects/"
)
@pytest.mark.parametrize("ours", ROWS)
def test_as_published(ours, monkeypatch):
    # Both files for RetinaNet name a class that torch has never had.
    monkeypatch.setattr(nn, "SyncBatchNorm2d", nn.SyncBatchNorm, raising=False)
    a, b = lazily(CONFIGS / f"{ours}.py"), lazily(PROJECT / f"{ROWS[ours]}.py")
    of_components = {f"{name}._target_" for name in COMPONENTS}
    for key in a.keys() & b.keys() - of_components - {"train.output_dir"}:
        if a[key] != b[key]:
            assert OF_THEM[key] == (b[key], a[key]), key
    for name, component in COMPONENTS.items():
        assert a.get(f"{name}._target_", component) in (component, b.get(f"{name}._target_"))
    more = [key for key in a.keys() - b.keys() if not any(part in key for part in OUR_OWN)]
    assert more == []
    less = {key for key in b.keys() - a.keys() if b[key] is not None}
    assert less <= {
        "model.head.norm",
        *(f"model.roi_heads.{x}_head.conv_norm" for x in ("box", "mask")),
    }
    # What they set for these parts, and how ours says it.
    for key in less:
        norm, theirs = a[f"{key}.name"], b[key]
        assert theirs in {norm, "SyncBatchNorm" if norm == "SyncBN" else "BatchNormBatchStat"}
    batch = a.get("model.roi_heads.box_head.conv_norm.eval_statistics") == "batch"
    assert batch == ("batch_stats" in ours)
    shuffled = a.get("model.roi_heads.box_head.shuffle"), a.get("model.roi_heads.mask_head.shuffle")
    assert (shuffled == (True, True)) == (
        "Shuffle" in b.get("model.roi_heads.box_head._target_", "")
    )
    together = a.get("model.head.norm.statistics") == "shared"
    assert together == ("SharedTraining" in b.get("model.head._target_", ""))
