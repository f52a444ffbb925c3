"""Blood cells, of a clone of the public data set that is drawn here."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from bn_det.data import prepare_blood_cells
from bn_det.data.blood_cells import FOLDER, LABORATORIES, SPLITS
from bn_det.data.coco import builtin_sources, datasets_root, load_coco
from bn_det.errors import InputError
from here import run_here

LABELS = "0 0.5 0.5 0.5 0.25\n1 0.1 0.9 0.4 0.4\n"
"""The second box reaches over the edge."""


@pytest.fixture
def clone(tmp_path):
    """An image of each published size in each split, and one more of the first."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for kind in ("images", "labels"):
            (tmp_path / "clone" / "TXL_PBC" / kind / split).mkdir(parents=True)
        for k, (width, height) in enumerate([*LABORATORIES, next(iter(LABORATORIES))]):
            image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            path = tmp_path / "clone" / "TXL_PBC" / "images" / split / f"{9 - k}.jpg"
            cv2.imwrite(str(path), image)
            path = tmp_path / "clone" / "TXL_PBC" / "labels" / split / f"{9 - k}.txt"
            path.write_text(LABELS)
    return tmp_path / "clone"


def test_command(clone, tmp_path, monkeypatch):
    """Each laboratory has its images, which are smaller, and the boxes with them."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    done = run_here("tools/prepare_blood_cells.py", clone)
    assert done.returncode == 0, done.stderr
    assert "| bccd_train   |        2 |       4 |" in done.stdout
    found = {}
    for name, source in builtin_sources().items():
        if name.startswith(FOLDER):
            dataset = load_coco(name, source, for_evaluation=True)
            found[name.removeprefix(f"{FOLDER}_")] = len(dataset.records)
            assert dataset.category_names == ["WBC", "RBC", "Platelet"]
            for record in dataset.records:
                shape = cv2.imread(record["file_name"]).shape
                assert shape[:2] == (record["height"], record["width"]) and max(shape) == 320
    of = {"bccd": 2, "bcd": 1, "pbc": 2, "raabin": 1}
    assert found == {f"{name}_{split}": number for split in SPLITS for name, number in of.items()}
    content = json.loads((datasets_root() / FOLDER / "annotations/bccd_val.json").read_text())
    boxes = [a["bbox"] for a in content["annotations"][:2]]
    assert boxes == [[80.0, 90.0, 160.0, 60.0], [0.0, 168.0, 96.0, 72.0]], "of 320 x 240 pixels"

    again = run_here("tools/prepare_blood_cells.py", clone)
    assert again.returncode == 1 and "exists; remove it, or name another folder" in again.stderr


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("labels/val/9.txt", None, "9.txt: cannot be read: No such file"),
        ("labels/val/9.txt", b"3 0.1 0.1 0.1 0.1", "9.txt, line 1: '3 0.1 0.1 0.1 0.1' is not"),
        ("labels/val/9.txt", b"0 0.1 0.1 0.1", "use a class from 0 to 2, and x, y, width and"),
        ("labels/val/9.txt", b"0 nan 0.1 0.1 0.1", "is not accepted"),
        ("labels/val/9.txt", b"0 0.5 0.5 inf 0.1", "is not accepted"),
        ("labels/val/9.txt", b"0 0.5 0.5 -0.1 0.1", "is not accepted"),
        ("labels/val/9.txt", b"1 1.2 0.5 0.1 0.1", "width and height of a box in the image"),
        ("labels/val/9.txt", b"\xff", "9.txt: cannot be read"),
        ("images/train/9.jpg", b"no image", "9.jpg: cannot be read as an image"),
    ],
)
def test_what_is_not_as_published(clone, tmp_path, name, content, words):
    path = clone / "TXL_PBC" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        prepare_blood_cells(clone, tmp_path / "made")
    assert words in str(error.value)
    assert os.listdir(tmp_path) == ["clone"], "nothing is left behind"


def test_an_image_of_another_size(clone, tmp_path):
    cv2.imwrite(str(clone / "TXL_PBC/images/val/9.jpg"), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(InputError, match="is of 20 x 10 pixels, which is of no laboratory"):
        prepare_blood_cells(clone, tmp_path / "made")


def test_no_clone(tmp_path):
    with pytest.raises(InputError, match="has no folder TXL_PBC/images/train; use a clone of"):
        prepare_blood_cells(tmp_path, tmp_path / "made")


def test_what_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name = "blood_cells_pbc_val"
    with pytest.raises(InputError, match=r"pbc_val.json; bn-det prepare-blood-cells makes it"):
        load_coco(name, builtin_sources()[name])


def test_the_published_numbers():
    """Of the real data set, where it is."""
    beside = Path(__file__).parents[3] / "shared/data/blood_cells"
    folder = next((f for f in (datasets_root() / FOLDER, beside) if f.is_dir()), None)
    if folder is None:
        pytest.skip("blood cells are not there; bn-det prepare-blood-cells makes them")
    found = {}
    for path in (folder / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        found[path.stem] = (len(content["images"]), len(content["annotations"]))
    assert found == {
        **{"bccd_train": (150, 3825), "bcd_train": (158, 3627), "pbc_train": (350, 6369)},
        **{"raabin_train": (350, 4795), "bccd_val": (44, 1105), "bcd_val": (44, 1003)},
        **{"pbc_val": (100, 1849), "raabin_val": (100, 1377)},
    }
