"""The config files: what they say of themselves, and what differs between those that compare."""

from pathlib import Path

import pytest
import yaml

from bn_det.config.keys import leaves
from bn_det.config.table import head_comment
from reference import EIGHT_CHOICES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml"))
MULTI_DOMAIN = ROOT / "configs" / "multi_domain"
LEAKAGE = ROOT / "configs" / "leakage"
HEADS = sorted(p.name for p in LEAKAGE.glob("head_*.yaml"))


def merged(path):
    """A config's leaves by their dotted keys, its bases included."""
    own = yaml.safe_load(path.read_text())
    inherited = merged(path.parent / own.pop("_BASE_")) if "_BASE_" in own else {}
    return {**inherited, **dict(leaves(own))}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_plain_yaml(config):
    text = (ROOT / config).read_text()
    assert isinstance(yaml.safe_load(text), dict) and "!!" not in text
    assert text.startswith("#"), "say in a comment what the file is"


def check_names(path, choices):
    """That a file's name says its choices, and its comment where statistics come from."""
    assert path.stem == "-".join(choices)
    assert ("PreciseBN" in head_comment(path.read_text())) == (choices[1] == "per_domain")


def choices_of(path):
    choices = yaml.safe_load(path.read_text())["MODEL"]["RETINANET"]["BN"]
    return tuple(choices[k] for k in ("STATISTICS", "POPULATION", "AFFINE"))


def test_the_eight_choices():
    found = {choices_of(p): p for p in (MULTI_DOMAIN / "shapes").glob("*.yaml")}
    assert set(found) == set(EIGHT_CHOICES)
    for choices, path in found.items():
        check_names(path, choices)


def test_the_rows_of_table_5():
    """On COCO, with the affine that the paper's levels share."""
    found = {choices_of(p): p for p in MULTI_DOMAIN.glob("*-*-*.yaml") if "Base" not in p.name}
    assert set(found) == {c for c in EIGHT_CHOICES if c[2] == "shared"}
    for choices, path in found.items():
        check_names(path, choices)


@pytest.mark.parametrize("folder", [LEAKAGE, LEAKAGE / "shapes"], ids=["coco", "shapes"])
def test_only_the_heads_norms_differ(folder):
    assert sorted(p.name for p in folder.glob("head_*.yaml")) == HEADS
    reference = merged(folder / "head_none.yaml")
    for name in HEADS:
        found = merged(folder / name)
        changed = {k for k in found if found[k] != reference.get(k)} - {"OUTPUT_DIR"}
        heads = ("MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD.", "TEST.BN_STATISTICS")
        assert bool(changed) == (name != "head_none.yaml")
        assert all(k.startswith(heads) for k in changed), changed


@pytest.mark.parametrize("name", HEADS)
def test_twins(name):
    """A config for COCO and its twin for shapes ask for the same in both heads, by their name."""
    norm, *option = name.removesuffix(".yaml").removeprefix("head_").split("_", 1)
    for folder in (LEAKAGE, LEAKAGE / "shapes"):
        found = merged(folder / name)
        assert found["OUTPUT_DIR"].endswith(f"{folder.relative_to(LEAKAGE.parent)}/{name[:-5]}")
        for head in ("MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD."):
            assert found[f"{head}NORM"] == ("" if norm == "none" else norm)
            assert found.get(f"{head}SHUFFLE", False) == (option == ["shuffle"])
            assert (found.get(f"{head}GHOST_SIZE", 0) > 0) == (norm == "GhostBN")
        statistics = "batch" if option == ["batch_stats"] else "population"
        assert found.get("TEST.BN_STATISTICS", "population") == statistics


POPULATION = MULTI_DOMAIN.with_name("population")


@pytest.mark.parametrize("folder", [POPULATION, POPULATION / "shapes"], ids=["coco", "shapes"])
@pytest.mark.parametrize("name", ["retinanet_PreciseBN", "mask_rcnn_PreciseBN", "retinanet_frozen"])
def test_population(folder, name):
    """What a config's name says is all that it changes."""
    detector, way = name.rsplit("_", 1)
    reference, found = merged(folder / f"{detector}_EMA.yaml"), merged(folder / f"{name}.yaml")
    assert not reference.get("TEST.PRECISE_BN.ENABLED")
    assert reference["TEST.EVAL_PERIOD"] > 0
    changed = {k for k in found if found[k] != reference.get(k)} - {"OUTPUT_DIR"}
    if way == "frozen":
        assert changed == {"SOLVER.FREEZE_BN_ITER"}
        assert found["SOLVER.FREEZE_BN_ITER"] == 0.8 * found["SOLVER.MAX_ITER"]
    else:
        assert found["TEST.PRECISE_BN.ENABLED"]
        assert all(k.startswith("TEST.PRECISE_BN.") for k in changed)


WAYS = MULTI_DOMAIN.with_name("ways")


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in WAYS.glob("*.yaml") if "Base" not in p.name)
)
def test_ways(name):
    """A way has a twin that asks for the same of FPN and head, and a line in the docs."""
    found = {}
    for folder in (WAYS, WAYS / "shapes"):
        config = dict(leaves(yaml.safe_load((folder / f"{name}.yaml").read_text())))
        assert config["OUTPUT_DIR"].endswith(f"{folder.relative_to(WAYS.parent)}/{name}")
        found[folder.name] = {
            # How much of it is for each to say.
            k: v if isinstance(v, (str, bool)) else type(v)
            for k, v in config.items()
            if not k.startswith(OWN)
        }
    assert found["ways"] == found["shapes"]
    assert f"`{name}.yaml`" in (ROOT / "docs" / "ways.md").read_text()


OWN = (
    *("OUTPUT_DIR", "MODEL.RESNETS.", "SOLVER.BRN.", "SOLVER.BASE_LR"),
    *("TEST.PRECISE_BN.NUM_ITER", "TEST.PRECISE_BN.IMS_PER_BATCH", "TEST.BN_STATISTICS_PARTS"),
    # of a pre-trained backbone
    *("MODEL.NF.", "MODEL.WEIGHTS", "MODEL.PIXEL_", "INPUT.FORMAT"),
)
"""What a config and its twin may have different."""


def test_every_way_has_a_twin():
    names = [sorted(p.name for p in folder.glob("*.yaml")) for folder in (WAYS, WAYS / "shapes")]
    assert names[0] == names[1]


LEVELS = MULTI_DOMAIN.with_name("heads")


@pytest.mark.parametrize("folder", [LEVELS, LEVELS / "shapes"], ids=["coco", "shapes"])
@pytest.mark.parametrize(
    "head, part", [("rpn", "RPN"), ("fcos", "BN_FCOS"), ("cascade", "ROI_BOX_HEAD")]
)
def test_heads(folder, head, part):
    """Only what levels share differs, as the names say."""
    shared, per_level = (merged(folder / f"{head}_{kind}.yaml") for kind in ("shared", "per_level"))
    assert per_level["OUTPUT_DIR"].endswith(f"{folder.relative_to(LEVELS.parent)}/{head}_per_level")
    changed = {k for k in per_level if per_level[k] != shared[k]} - {"OUTPUT_DIR"}
    assert changed == {f"MODEL.{part}.BN.{choice}" for choice in ("STATISTICS", "POPULATION")}
    assert {shared[k] for k in changed} == {"shared"}
    assert {per_level[k] for k in changed} == {"per_domain"}


BLOOD_CELLS = MULTI_DOMAIN.with_name("blood_cells")
PER_LABORATORY = ("MODEL.BN_SOURCES.PARTS", "DATASETS.SOURCES", "DATASETS.TEST")


@pytest.mark.parametrize("folder", [BLOOD_CELLS, BLOOD_CELLS / "small"], ids=["GPUs", "small"])
@pytest.mark.parametrize(
    "detector, way, keys",
    [
        (
            "retinanet",
            "per_level",
            {f"MODEL.RETINANET.BN.{k}" for k in ("STATISTICS", "POPULATION")},
        ),
        (
            *("retinanet", "PreciseBN"),
            {f"TEST.PRECISE_BN.{k}" for k in ("ENABLED", "NUM_ITER", "IMS_PER_BATCH")},
        ),
        ("retinanet", "per_laboratory", {*PER_LABORATORY}),
        ("faster_rcnn", "per_laboratory", {*PER_LABORATORY, "MODEL.META_ARCHITECTURE"}),
    ],
)
def test_blood_cells(folder, detector, way, keys):
    """What a config's name says is all that it changes, and the new laboratory is tested alone."""
    reference, found = (merged(folder / f"{detector}_{of}.yaml") for of in ("joint", way))
    changed = {k for k in found if found[k] != reference.get(k)}
    assert changed == {*keys, "OUTPUT_DIR"}
    assert "raabin" not in found["DATASETS.TRAIN"] and "raabin" in reference["DATASETS.TEST"]


@pytest.mark.parametrize("name", sorted(p.stem for p in BLOOD_CELLS.glob("*_*.yaml")))
def test_blood_cells_twins(name):
    """A config for GPUs and its small twin have the same data, and the same ways of BatchNorm."""
    found = {
        k: dict(leaves(yaml.safe_load((folder / f"{name}.yaml").read_text())))
        for k, folder in enumerate((BLOOD_CELLS, BLOOD_CELLS / "small"))
    }
    assert found[1].pop("OUTPUT_DIR") == f"output/blood_cells/small/{name}"
    assert found[0].pop("OUTPUT_DIR") == f"output/blood_cells/{name}"
    assert found[0] == found[1]
