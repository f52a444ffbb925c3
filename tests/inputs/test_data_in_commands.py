"""Broken data sets in the commands, on both hosts: one line, and nothing is begun."""

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bn_det.data.masks import decode_mask, encode_mask
from here import run_here
from hosts import detectron2, every_host
from reference import BASE, norm_opts


@pytest.fixture
def sets(tiny_shapes, tmp_path):
    """A copy of the data, to be broken: options, and the folder of each part."""
    registered = ast.literal_eval(tiny_shapes[1])
    copied = []
    for name, file, images in registered:
        folder = tmp_path / name
        shutil.copytree(images, folder / "images")
        shutil.copy(file, folder / "a.json")
        copied.append([name, str(folder / "a.json"), str(folder / "images")])
    return [tiny_shapes[0], repr(copied), *tiny_shapes[2:]], tmp_path


def train(host, opts, out, *more):
    args = [
        *("--host", host, "--config-file", BASE, *more, "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "100000", "SOLVER.IMS_PER_BATCH", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", *norm_opts("GN"), *opts),
    ]
    return run_here("tools/train_net.py", *args)


def error_of(done):
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@every_host
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_annotation(host, part, sets, tmp_path):
    """In the test set, too, before the training: it is refused, or it would kill the process."""
    opts, root = sets
    file = root / f"tiny_{part}" / "a.json"
    content = json.loads(file.read_text())
    content["annotations"][3]["segmentation"][0][0] = float("nan")
    file.write_text(json.dumps(content))
    line = error_of(train(host, opts, tmp_path / "out"))
    number = content["annotations"][3]["id"]
    assert f"tiny_{part}: {file}: annotation {number}: segmentation: a polygon is not" in line
    assert not (tmp_path / "out" / "metrics.json").exists()


def deep(path):
    Image.fromarray(np.full((128, 128), 40000, np.uint16)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


def empty(path):
    path.write_bytes(b"")


def circle(path):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def small(path):
    Image.new("RGB", (20, 30)).save(path)


@every_host
@pytest.mark.parametrize(
    "make, words",
    [
        (deep, "pixels of mode I;16 are not accepted; use 8 bits a channel"),
        (cut, "cannot be read as an image: "),
        (small, "20"),
        (Path.unlink, "there is no such image"),
        (empty, "is empty, or no image of a known format"),
        (circle, "cannot be read as an image: Too many levels of symbolic links"),
        (pipe, "is a pipe, a device or a socket; use a file"),
    ],
    ids=["16 bits", "cut", "of another size", "missing", "empty", "circle", "pipe"],
)
def test_an_image(host, make, words, sets, tmp_path):
    opts, root = sets
    images = sorted((root / "tiny_train" / "images").iterdir())
    for path in images:
        make(path)
    line = error_of(train(host, opts, tmp_path / "out"))
    assert any(str(path) in line for path in images) and words in line


SHAPES = [(5000, 30), (30, 5000), (20_000, 1), (1, 20_000), (1, 1)]


@every_host
def test_images_of_any_shape(host, sets, tmp_path):
    """Scaled to the longest side that is accepted, the other side of some would be 0 pixels."""
    opts, root = sets
    for part in ("train", "val"):
        file = root / f"tiny_{part}" / "a.json"
        content = json.loads(file.read_text())
        for image in content["images"]:
            image["width"], image["height"] = size = SHAPES[image["id"] % len(SHAPES)]
            Image.new("RGB", size).save(file.parent / "images" / image["file_name"])
        for annotation in content["annotations"]:
            width, height = SHAPES[annotation["image_id"] % len(SHAPES)]
            annotation["bbox"], annotation["area"] = [0, 0, width, height], width * height
            annotation["segmentation"] = [[0, 0, width, 0, width, height, 0, height]]
        file.write_text(json.dumps(content))
    sizes = ("INPUT.MAX_SIZE_TRAIN", "256", "INPUT.MAX_SIZE_TEST", "256")
    done = train(host, [*opts, *sizes, "SOLVER.MAX_ITER", "3"], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Evaluation results for bbox" in done.stdout


@pytest.mark.parametrize("host", [detectron2])
def test_rle_as_polygons(host, sets, tmp_path):
    """Detectron2's own words for it would be an assertion, at the first such image."""
    opts, root = sets
    file = root / "tiny_train" / "a.json"
    content = json.loads(file.read_text())
    annotation = content["annotations"][3]
    mask = decode_mask(annotation["segmentation"], 128, 128)
    annotation["segmentation"] = encode_mask(mask)
    file.write_text(json.dumps(content))
    opts = ["MODEL.MASK_ON", "True", *opts]
    assert error_of(train(host, opts, tmp_path / "out")) == (
        f"error: INPUT.MASK_FORMAT: 'polygon' is not accepted with tiny_train: {file}: annotation "
        f"{annotation['id']} is RLE; use 'bitmask'"
    )


@every_host
def test_a_source_of_a_data_set_that_is_not_there(host, sets, tmp_path):
    opts, _ = sets
    line = error_of(train(host, [*opts, "DATASETS.SOURCES", "[['a', 'tiny_vall']]"], tmp_path))
    assert "DATASETS.SOURCES: 'tiny_vall' is not a registered data set; nearest names: ['ti" in line


@every_host
def test_an_argument_of_no_text(host, sets, tmp_path):
    """Bytes that are no UTF-8 come from the system so."""
    opts, _ = sets
    line = error_of(train(host, opts, f"{tmp_path}/\udcff"))
    assert line.endswith(r"\udcff': is not accepted; use text of UTF-8")
