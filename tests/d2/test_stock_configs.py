"""Detectron2's own YAML files, loaded by us as by Detectron2."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import logging
from pathlib import Path

import detectron2.config
from detectron2 import model_zoo

from bn_det.config.load import load_config
from bn_det.config.yaml_file import load_yaml
from bn_det.d2 import add_bn_det_config
from bn_det.errors import InputError

FOLDER = Path(model_zoo.__file__).parent / "configs"
FILES = sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.yaml"))
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def make_cfg():
    cfg = detectron2.config.get_cfg()
    add_bn_det_config(cfg)
    return cfg


def test_the_files_are_there():
    assert len(FILES) > 80 and {"Base-RetinaNet.yaml", RETINANET} <= set(FILES)
    assert any(name.startswith("quick_schedules/") for name in FILES)
    assert model_zoo.get_config_file(RETINANET) == str(FOLDER / RETINANET)


@pytest.mark.parametrize("name", FILES)
def test_equal_to_what_detectron2_loads(name):
    """To the last bit of a float, and in the types."""
    ours, theirs = make_cfg(), make_cfg()
    load_config(ours, str(FOLDER / name), [], "Detectron2")
    theirs.merge_from_file(str(FOLDER / name))  # with Python's eval
    assert repr(ours) == repr(theirs) and ours == theirs


def test_the_arithmetic_of_retinanet():
    cfg = make_cfg()
    load_config(cfg, str(FOLDER / RETINANET), [], "Detectron2")
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
    assert "eval" in (FOLDER / "Base-RetinaNet.yaml").read_text()


def test_an_old_version_is_upgraded(tmp_path, caplog):
    """Of the config, as Detectron2 does; a later one than it knows is refused."""
    path = tmp_path / "old.yaml"
    path.write_text("MODEL: {WEIGHT: w.pkl}\nTEST: {AUG_ON: True}")
    ours, theirs = make_cfg(), make_cfg()
    with caplog.at_level(logging.WARNING):
        load_config(ours, str(path), ["MODEL.RPN.NORM", ""], "Detectron2")
    assert f"old v1 config file '{path}'" in caplog.text
    theirs.merge_from_file(str(path))
    assert repr(ours) == repr(theirs)
    assert (ours.MODEL.WEIGHTS, ours.TEST.AUG.ENABLED, ours.VERSION) == ("w.pkl", True, 2)
    path.write_text("VERSION: 3")
    with pytest.raises(InputError, match="old.yaml: Cannot merge a v3 config into a v2 config"):
        load_config(ours, str(path), [], "Detectron2")


def test_nothing_of_a_load_remains(tmp_path):
    """The config then loads other files by itself."""
    cfg, path = make_cfg(), tmp_path / "a.yaml"
    path.write_text("SOLVER: {BASE_LR: 0.5}")
    load_config(cfg, str(FOLDER / RETINANET), [], "Detectron2")
    cfg.merge_from_file(str(path))
    assert cfg.SOLVER.BASE_LR == 0.5 and load_yaml(str(path)) == {"SOLVER": {"BASE_LR": 0.5}}
