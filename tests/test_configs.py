"""Every config file builds and takes one training step, on both hosts."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from bn_det.config import load_config
from bn_det.tv import get_cfg
from bn_det.tv.trainer import Trainer
from reference import EIGHT_CHOICES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml"))
MULTI_DOMAIN = ROOT / "configs" / "multi_domain" / "shapes"
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


@pytest.fixture
def options(tiny_shapes, tmp_path):
    return [
        *tiny_shapes,
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"),
        *("DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2"),
    ]


def takes_a_step(trainer):
    """Whether training changes the weights."""
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    pairs = zip(before, trainer.model.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


@every_config
def test_torchvision(config, options, tmp_path):
    cfg = get_cfg()
    load_config(cfg, str(ROOT / config), options, "torchvision")
    trainer = Trainer(cfg)
    assert takes_a_step(trainer)
    assert (tmp_path / "model_final.pth").exists()


@every_config
@pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
def test_detectron2(config, options, tmp_path):
    import detectron2.config

    from bn_det.d2 import register_datasets
    from bn_det.d2.train import Trainer, add_bn_det_config

    cfg = detectron2.config.get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, str(ROOT / config), options, "Detectron2")
    register_datasets(cfg)
    trainer = Trainer(cfg)
    assert takes_a_step(trainer)
    assert (tmp_path / "model_final.pth").exists()


@every_config
def test_plain_yaml(config):
    text = (ROOT / config).read_text()
    assert isinstance(yaml.safe_load(text), dict) and "!!" not in text
    assert text.startswith("#"), "say in a comment what the file is"


def test_the_eight_choices():
    found = {}
    for path in MULTI_DOMAIN.glob("*.yaml"):
        choices = yaml.safe_load(path.read_text())["MODEL"]["RETINANET"]["BN"]
        found[tuple(choices[k] for k in ("STATISTICS", "POPULATION", "AFFINE"))] = path
    assert set(found) == set(EIGHT_CHOICES)
    rows = ["shared-shared", "shared-per_domain", "per_domain-shared", "per_domain-per_domain"]
    for choices, path in found.items():
        assert path.stem == "-".join(choices)
        row = 1 + rows.index("-".join(choices[:2]))
        comment = path.read_text().split("_BASE_")[0].lower().replace("\n# ", " ")
        assert f"row {row} of table 5" in comment
        assert ("ours" in comment) == (choices[2] == "per_domain")
        assert ("precisebn" in comment) == (choices[1] == "per_domain")
