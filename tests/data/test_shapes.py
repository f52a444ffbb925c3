import colorsys
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from bn_det.data import shapes
from bn_det.data.coco import CocoSource, load_coco, prepare
from bn_det.data.shapes import (
    CATEGORIES,
    IMAGE_SIZE,
    SHAPES,
    SHAPES_CORRELATED,
    SHIFTED,
    VARIANTS,
    Split,
    draw_image,
)
from bn_det.errors import InputError
from waiting import wait_for

SMALL = {"train": Split(5, 0), "val": Split(3, 1)}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


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


@each_variant
def test_coco_format(tmp_path, variant):
    root = shapes.generate_shapes(tmp_path / "shapes", SMALL, variant)
    source = CocoSource(str(root / "annotations/instances_train.json"), str(root / "train"))
    dataset = load_coco("train", source)
    assert dataset.category_names == list(CATEGORIES)
    for record in dataset.records:
        image = cv2.imread(record["file_name"])
        assert image.shape == (record["height"], record["width"], 3) == (IMAGE_SIZE,) * 2 + (3,)
        # One that finds no place is left out.
        assert 1 <= len(record["annotations"]) <= variant.num_objects[1]
    for annotation in dataset.coco.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= IMAGE_SIZE and y + height <= IMAGE_SIZE
        low, high = variant.object_sizes
        assert low - 0.1 <= max(width, height) <= high + 0.1
        (polygon,) = annotation["segmentation"]
        points = np.array(polygon).reshape(-1, 2)
        corners = [*points.min(0), *(points.max(0) - points.min(0))]
        np.testing.assert_allclose(corners, annotation["bbox"], atol=0.02)  # rounded to 0.01
        # The mask that pycocotools draws of the polygon, against the shoelace formula.
        mask = dataset.coco.annToMask(annotation)
        assert abs(mask.sum() - annotation["area"]) <= 0.2 * annotation["area"] + 10


@pytest.mark.parametrize("variant", [SHAPES, SHAPES_CORRELATED], ids=["shapes", "correlated"])
def test_objects_are_where_the_annotations_say(variant):
    """A single object's polygon covers its pixels: a shade of one colour, unlike the ground."""
    checked = 0
    for index in range(60):
        image, objects = draw_image(7, index, variant._replace(num_objects=(1, 2)))
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
    quantiles = (np.log(sizes) - np.log(SHAPES.object_sizes[0])) / np.ptp(
        np.log(SHAPES.object_sizes)
    )
    found = np.histogram(quantiles, bins=4, range=(0, 1))[0] / len(sizes)
    # Large objects find a place less often; none of the quarters is rare.
    assert (found > 0.17).all() and (found < 0.33).all()


# Of version 1: the first object of images 0 to 2 of the training split, and the images' mean.
DRAWN = {
    "shapes": [
        ([100.44, 80.18, 24.15, 24.15], 131.87),
        ([26.55, 19.87, 54.08, 54.08], 115.04),
        ([15.33, 22.32, 73.56, 73.56], 115.69),
    ],
    "shapes_correlated": [
        ([1.25, 4.2, 42.09, 42.97], 113.06),
        ([61.66, 43.74, 39.03, 40.31], 124.49),
        ([50.94, 68.19, 42.13, 42.13], 129.91),
    ],
    "shapes_few": [
        ([14.32, 23.61, 87.27, 79.64], 116.89),
        ([40.36, 22.38, 83.05, 83.05], 119.14),
        ([33.09, 61.58, 65.31, 65.31], 108.24),
    ],
}
BOXES = [box for box, _ in DRAWN["shapes"]]
MEANS = {"night": (48.25, 32.21, 37.67), "fog": (167.91, 156.28, 165.34)}
MEANS["sensor"] = (134.13, 120.63, 118.9)
DRAWN |= {f"shapes_{k}": list(zip(BOXES, means, strict=True)) for k, means in MEANS.items()}


@each_variant
def test_what_is_drawn_changes_with_the_version_alone(variant):
    assert variant.version == 1, "draw DRAWN anew"
    for index, (box, mean) in enumerate(DRAWN[variant.name]):
        image, objects = draw_image(variant.splits["train"].seed, index, variant)
        assert objects[0]["bbox"] == pytest.approx(box, abs=0.02)
        assert image.mean() == pytest.approx(mean, abs=0.05)


def test_splits_have_seeds_of_their_own():
    unshifted = [v for v in VARIANTS.values() if v not in SHIFTED]
    seeds = [split.seed for v in unshifted for split in v.splits.values()]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("variant", SHIFTED, ids=lambda variant: variant.name)
def test_the_same_objects_in_another_appearance(variant):
    """Channels are further from the plain ones than these are from each other."""
    plain, shifted = [], []
    for index in range(20):
        image, objects = draw_image(1, index)
        other, same = draw_image(1, index, variant)
        assert same == objects and other.dtype == np.uint8
        plain.append(image.reshape(-1, 3).mean(0))
        shifted.append(other.reshape(-1, 3).mean(0))
        # And they can still be seen: edges are where they were.
        edges = [np.abs(np.diff(i.astype(float).mean(2), axis=0)) for i in (image, other)]
        assert np.corrcoef(edges[0].ravel(), edges[1].ravel())[0, 1] > 0.1
    moved = np.abs(np.mean(shifted, 0) - np.mean(plain, 0)) / np.std(plain, 0)
    assert moved.max() > 1.5


def median_hue(image, annotation):
    polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2) - 0.5
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1)
    blue_green_red = np.median(image[mask > 0], axis=0) / 255
    return colorsys.rgb_to_hsv(*blue_green_red[::-1])[0]


@each_variant
def test_what_neighbours_tell(variant):
    """The hue nearest to an object's, and to the mean hue of all objects of its image."""
    one = together = total = 0
    centres = np.exp(2j * np.pi * np.arange(len(CATEGORIES)) / len(CATEGORIES))
    seed = list(variant.splits.values())[-1].seed  # of the validation set, where there is one
    for index in range(150):
        image, objects = draw_image(seed, index, variant)
        categories = np.array([o["category_id"] - 1 for o in objects])
        hues = np.exp(2j * np.pi * np.array([median_hue(image, o) for o in objects]))
        agreement = (hues[:, None] * centres.conj()).real
        one += (agreement.argmax(1) == categories).sum()
        together += (agreement.sum(0).argmax() == categories).sum()
        total += len(objects)
        if variant.common_hue_spread is not None:
            assert len(set(categories)) == 1
    if variant.common_hue_spread is None:
        assert together < one - 0.1 * total
    else:
        assert one < 0.6 * total and together > one + 0.1 * total


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


def test_a_generation_that_goes_on_is_left_alone(tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=shapes.generate_shapes, args=(root, {"a": Split(100000, 0)}))
    process.start()
    try:
        wait_for(lambda: list(tmp_path.glob(".shapes-*/a/*.png")), 60)
        shapes.generate_shapes(root, SMALL)
        assert list(tmp_path.glob(".shapes-*/a/*.png")) and process.is_alive()
    finally:
        process.kill()
        process.join(60)


def test_a_folder_that_is_taken_before_it_is_locked(tmp_path, monkeypatch):
    """Another generation takes it for left behind: a new one is begun."""
    locks = iter([False, None, True])

    def try_lock(file):
        locked = next(locks)
        if locked is None:  # and the other is through with it already
            shutil.rmtree(Path(file.name).parent)
        return locked is not False

    monkeypatch.setattr(shapes, "try_lock", try_lock)
    shapes.generate_shapes(tmp_path / "shapes", SMALL)
    assert next(locks, None) is None and os.listdir(tmp_path) == ["shapes"]


def test_nothing_takes_what_is_done(tmp_path, monkeypatch):
    """Between the last file and the rename there is no lock to be had."""
    root, rename = tmp_path / "shapes", os.rename

    def renamed(*paths):
        shapes._remove_unfinished(root)
        rename(*paths)

    monkeypatch.setattr(os, "rename", renamed)
    shapes.generate_shapes(root, SMALL)
    assert len(list((root / "train").iterdir())) == 5


def test_a_killed_generation_is_not_taken_for_a_finished_one(tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    many = {"train": Split(100000, 0)}
    process = context.Process(target=shapes.generate_shapes, args=(root, many))
    process.start()
    try:
        wait_for(lambda: list(tmp_path.glob(".shapes-*/train/*.png")), 60)
    finally:
        process.kill()
        process.join(60)
    assert not root.exists()
    shapes.generate_shapes(root, SMALL)
    assert len(list((root / "train").iterdir())) == 5
    assert os.listdir(tmp_path) == ["shapes"], "what the killed one left is gone"
    assert sorted(os.listdir(root)) == ["annotations", "train", "val"]


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


def test_a_folder_of_the_other_variant(tmp_path):
    shapes.generate_shapes(tmp_path / "shapes", SMALL, VARIANTS["shapes_correlated"])
    with pytest.raises(InputError, match="not of version 1 of the shapes data set.*_correlated"):
        shapes.generate_shapes(tmp_path / "shapes", SMALL)


@each_variant
def test_prepare_generates_where_the_environment_says(tmp_path, monkeypatch, variant):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(VARIANTS, variant.name, variant._replace(splits=SMALL))
    from bn_det.data.coco import builtin_sources

    source = builtin_sources()[f"{variant.name}_val"]
    prepare(f"{variant.name}_val", source)
    assert os.listdir(tmp_path) == [variant.name]
    path = tmp_path / variant.name / "annotations" / "instances_val.json"
    assert json.loads(path.read_text())["info"]["description"] == f"bn_det {variant.name}"


def test_builtin_coco(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    from bn_det.data.coco import builtin_sources

    coco = builtin_sources()["coco_2017_val"]
    assert coco.json_file == str(tmp_path / "coco/annotations/instances_val2017.json")
    assert coco.image_root == str(tmp_path / "coco/val2017")
    with pytest.raises(InputError, match="coco_2017_val: there is no annotation file"):
        prepare("coco_2017_val", coco)
