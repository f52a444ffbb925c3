import json
import multiprocessing
import os
import signal
import time

import cv2
import numpy as np
import pytest

from bn_det.data import shapes
from bn_det.data.coco import CocoSource, load_coco, prepare
from bn_det.data.shapes import CATEGORIES, IMAGE_SIZE, OBJECT_SIZES, Split, draw_image
from bn_det.errors import InputError

SMALL = {"train": Split(5, 0), "val": Split(3, 1)}


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_deterministic_by_seed(tmp_path):
    a = shapes.generate_shapes(tmp_path / "a", SMALL)
    b = shapes.generate_shapes(tmp_path / "b", SMALL)
    assert files(a) == files(b) and len(files(a)) == 5 + 3 + 2
    more = shapes.generate_shapes(tmp_path / "c", {"train": Split(6, 0), "val": Split(3, 2)})
    assert files(more)[next(p for p in files(more) if p.name == "000004.png")]
    for k in range(5):
        name = f"train/{k:06d}.png"
        assert (a / name).read_bytes() == (more / name).read_bytes()
    assert (a / "val/000000.png").read_bytes() != (more / "val/000000.png").read_bytes()


def test_coco_format(tmp_path):
    root = shapes.generate_shapes(tmp_path / "shapes", SMALL)
    source = CocoSource(str(root / "annotations/instances_train.json"), str(root / "train"))
    dataset = load_coco("train", source)
    assert dataset.category_names == list(CATEGORIES)
    for record in dataset.records:
        image = cv2.imread(record["file_name"])
        assert image.shape == (record["height"], record["width"], 3) == (IMAGE_SIZE,) * 2 + (3,)
        assert 1 <= len(record["annotations"]) <= shapes.MAX_OBJECTS
    for annotation in dataset.coco.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= IMAGE_SIZE and y + height <= IMAGE_SIZE
        assert OBJECT_SIZES[0] - 0.1 <= max(width, height) <= OBJECT_SIZES[1] + 0.1
        (polygon,) = annotation["segmentation"]
        points = np.array(polygon).reshape(-1, 2)
        corners = [*points.min(0), *(points.max(0) - points.min(0))]
        np.testing.assert_allclose(corners, annotation["bbox"], atol=0.02)  # rounded to 0.01
        # The mask that pycocotools draws of the polygon, against the shoelace formula.
        mask = dataset.coco.annToMask(annotation)
        assert abs(mask.sum() - annotation["area"]) <= 0.2 * annotation["area"] + 10


def test_objects_are_where_the_annotations_say():
    """A single object's polygon covers its pixels: a shade of one colour, unlike the ground."""
    checked = 0
    for index in range(60):
        image, objects = draw_image(7, index)
        if len(objects) > 1:
            continue
        polygon = np.array(objects[0]["segmentation"][0]).reshape(-1, 2) - 0.5
        mask = np.zeros(image.shape[:2], np.uint8)
        cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1)
        inside = cv2.erode(mask, np.ones((5, 5))) > 0
        outside = cv2.dilate(mask, np.ones((5, 5))) == 0
        if inside.sum() < 20:
            continue
        difference = np.median(image[inside], 0) - np.median(image[outside], 0)
        assert np.abs(difference).max() > 30
        checked += 1
    assert checked > 5


def test_sizes_are_log_uniform():
    sizes = [max(o["bbox"][2:]) for index in range(600) for o in draw_image(0, index)[1]]
    quantiles = (np.log(sizes) - np.log(OBJECT_SIZES[0])) / np.ptp(np.log(OBJECT_SIZES))
    found = np.histogram(quantiles, bins=4, range=(0, 1))[0] / len(sizes)
    # Large objects find a place less often; none of the quarters is rare.
    assert (found > 0.17).all() and (found < 0.33).all()


def _generate(root, barrier):
    barrier.wait()
    shapes.generate_shapes(root, SMALL)


def test_two_processes_at_once(tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_generate, args=(root, barrier)) for _ in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["shapes"]
    assert files(root) == files(shapes.generate_shapes(tmp_path / "other", SMALL))


def test_a_killed_generation_is_not_taken_for_a_finished_one(tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    many = {"train": Split(100000, 0)}
    process = context.Process(target=shapes.generate_shapes, args=(root, many))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes-*/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not root.exists()
    shapes.generate_shapes(root, SMALL)
    assert len(list((root / "train").iterdir())) == 5


def test_an_exception_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shapes.generate_shapes(tmp_path / "shapes", SMALL)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_version(tmp_path):
    root = shapes.generate_shapes(tmp_path / "shapes", SMALL)
    assert shapes.generate_shapes(root, SMALL) == root
    path = root / "annotations/instances_val.json"
    path.write_text(json.dumps({"info": {"version": 0}}))
    with pytest.raises(InputError, match="instances_val.json is not of version"):
        shapes.generate_shapes(root, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: exists, and is not the shapes data set"):
        shapes.generate_shapes(tmp_path / "empty", SMALL)


def test_prepare_generates_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(shapes, "SPLITS", SMALL)
    from bn_det.data.coco import builtin_sources

    source = builtin_sources()["shapes_val"]
    prepare("shapes_val", source)
    assert (tmp_path / "shapes/annotations/instances_val.json").is_file()
    coco = builtin_sources()["coco_2017_val"]
    assert coco.json_file == str(tmp_path / "coco/annotations/instances_val2017.json")
    assert coco.image_root == str(tmp_path / "coco/val2017")
    with pytest.raises(InputError, match="coco_2017_val: there is no annotation file"):
        prepare("coco_2017_val", coco)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "not in COCO's format"),
        ('{"images": []}', "not in COCO's format"),
        ('{"images": [], "annotations": [], "categories": []}', "no images or no categories"),
        (
            '{"images": [{"id": 1, "file_name": "a.png", "height": 1, "width": 1}], '
            '"annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]}], '
            '"categories": [{"id": 1, "name": "a"}]}',
            "not in COCO's format.*9",
        ),
    ],
)
def test_broken_annotations(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_coco("mine", CocoSource(str(path), str(tmp_path)))
