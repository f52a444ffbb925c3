"""What training sees of odd data sets: on both hosts the same, or the same line."""

import json

import numpy as np
import pytest
import torch
from inputs.test_annotation_files import (
    HEIGHT,
    LEFT_OUT,
    REACHES_OUT,
    USED,
    WIDTH,
    annotation,
    changed,
    valid,
)
from PIL import Image

from bn_det.errors import InputError
from hosts import INSTALLED, every_host, make_cfg
from reference import BASE

SEEN = {
    **{name: change for name, (change, _) in LEFT_OUT.items()},
    **USED,
    **REACHES_OUT,
    "odd polygon": annotation(segmentation=[[1, 1, 4, 4, 5, 5, 6]]),
    "keypoints are a number": annotation(keypoints=5),
    "a crowd": annotation(iscrowd=1),
    "sizes are floats": changed("images", 0, height=float(HEIGHT), width=float(WIDTH)),
}
"""Changes of a file that both hosts take."""


def write(folder, content, name="mine"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for image in content["images"]:
        Image.fromarray(pixels).save(folder / image["file_name"])
    return [name, str(path), str(folder)]


def cfg_of(host, train, *test):
    """A config that trains on a registered set, each image once in its own size."""
    cfg = make_cfg(
        *(host, BASE, "INPUT.MIN_SIZE_TRAIN", f"({HEIGHT},)", "INPUT.RANDOM_FLIP", "none"),
        *("DATASETS.REGISTER_COCO", repr([train, *test]), "DATASETS.TRAIN", f"('{train[0]}',)"),
        *("DATASETS.TEST", repr(tuple(entry[0] for entry in test))),
        *("MODEL.RETINANET.NUM_CLASSES", "2", "SOLVER.IMS_PER_BATCH", "1"),
        *("DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "2", "SEED", "0"),
    )
    if host == "detectron2":
        from bn_det.d2 import register_datasets

        register_datasets(cfg)
    return cfg


def seen(host, cfg):
    """The pixels, boxes and classes of a few draws of the training, by image."""
    if host == "detectron2":
        from bn_det.d2.datasets import build_train_loader, load_training

        batches = iter(load_training(cfg, build_train_loader))
        samples = [next(batches)[0] for _ in range(6)]
        return {
            s["image_id"]: (s["image"].float(), s["instances"].gt_boxes.tensor,
                            s["instances"].gt_classes)
            for s in samples
        }  # fmt: skip
    from bn_det.tv.data import build_train_loader
    from bn_det.tv.trainer import load_datasets

    samples = [s for (s,) in build_train_loader(cfg, load_datasets(cfg, "TRAIN"), 0, 0)]
    return {of["image_id"]: (image, t["boxes"], t["labels"]) for image, t, of in samples}


@pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed")
@pytest.mark.parametrize("row", SEEN)
def test_the_same_is_seen(row, tmp_path):
    """Also that what is left out on one host is no empty image on the other."""
    entry = write(tmp_path, SEEN[row](valid()))
    found = [seen(host, cfg_of(host, entry)) for host in ("torchvision", "detectron2")]
    assert found[0].keys() == found[1].keys() and found[0]
    for image_id, sample in found[0].items():
        for ours, theirs in zip(sample, found[1][image_id], strict=True):
            torch.testing.assert_close(ours, theirs)


def seen_in_test(host, cfg):
    """The pixels of a test set, by image."""
    if host == "detectron2":
        from bn_det.d2.datasets import build_test_loader

        loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        return {sample["image_id"]: sample["image"].float() for (sample,) in loader}
    from bn_det.tv.data import build_test_loader
    from bn_det.tv.trainer import load_datasets

    (dataset,) = load_datasets(cfg, "TEST")
    return {record["image_id"]: image for ((image, _, record),) in build_test_loader(cfg, dataset)}


@pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed")
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1), (5000, 30), (64, 43)], ids=str)
def test_the_same_is_seen_of_any_shape(size, tmp_path):
    content = {**valid(), "annotations": valid()["annotations"][:1]}
    content["annotations"][0].update(bbox=[0, 0, *size], segmentation=None)
    for image in content["images"]:
        image["width"], image["height"] = size
    entry = write(tmp_path, content)
    for image in content["images"]:
        noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / image["file_name"])
    found = []
    for host in ("torchvision", "detectron2"):
        cfg = cfg_of(host, entry, entry)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 1333
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 700
        found.append((seen(host, cfg)[2], seen_in_test(host, cfg)[2]))
    (ours, tests), (theirs, theirs_tests) = found
    for a, b in (ours[0], theirs[0]), (tests, theirs_tests):  # Pillow rounds otherwise
        torch.testing.assert_close(a, b, atol=1, rtol=0)
    torch.testing.assert_close(ours[1:], theirs[1:])


@every_host
@pytest.mark.parametrize(
    "change",
    [lambda content: {**content, "annotations": []}, annotation(iscrowd=1), annotation(image_id=9)],
    ids=["none", "crowds", "elsewhere"],
)
def test_no_objects(host, change, tmp_path):
    content = valid()
    content["annotations"] = content["annotations"][:1]
    cfg = cfg_of(host, write(tmp_path, change(content)))
    with pytest.raises(InputError, match=r"^DATASETS.TRAIN: \('mine',\) is not accepted; name a d"):
        seen(host, cfg)


def small(path):
    Image.new("RGB", (4, 5)).save(path)


def broken(path):
    """In the middle of its pixels, of which all before could be taken for the image."""
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 60
    content[middle : middle + 2] = b"zz"
    path.write_bytes(content)


def postscript(path):
    """Pillow has Ghostscript run it, whatever it is called."""
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n")


@every_host
@pytest.mark.parametrize(
    "make, words",
    [
        (small, "is 4x5 pixels, its annotation says 8x6"),
        (broken, "cannot be read as an image: .* data stream "),
        (postscript, "is PostScript, a program that would be run; use an image such as PNG or JP"),
    ],
)
def test_images(host, make, words, tmp_path):
    entry = write(tmp_path, valid())
    for path in tmp_path.glob("*.png"):
        make(path)
    with pytest.raises(InputError, match=rf"^{tmp_path}/[12].png: {words}"):
        seen(host, cfg_of(host, entry))


SWAPPED = [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}]
OTHERS = [{"id": 1, "name": "cat"}, {"id": 3, "name": "wolf"}]
"""Categories of a test set, where training has cat and dog."""


def begin(host, cfg):
    """What a training looks at before its first step."""
    if host == "torchvision":
        from bn_det.tv.trainer import Trainer

        return Trainer(cfg)
    from bn_det.d2.train import check_data

    return check_data(cfg)


@every_host
@pytest.mark.parametrize(
    "categories, words",
    [
        (
            SWAPPED,
            "DATASETS.TEST: class 0 is 'dog' in test, and 'cat' in mine of DATASETS.TR",
        ),
        ([SWAPPED[0]], "MODEL.RETINANET.NUM_CLASSES: 2 is not accepted; test of .*TEST has 1 cat"),
        ([*OTHERS, {"id": 4, "name": "x"}], "RETINANET.NUM_CLASSES: 2 is not .* has 3 categories"),
    ],
    ids=["swapped", "fewer", "more"],
)
def test_categories_of_another_order(host, categories, words, tmp_path):
    """Detections of the one would be compared with objects of the other."""
    content = {**valid(), "categories": categories}
    content["annotations"] = [{**a, "category_id": 1} for a in content["annotations"]]
    sets = write(tmp_path, valid()), write(tmp_path, content, "test")
    with pytest.raises(InputError, match=words):
        begin(host, cfg_of(host, *sets))


@every_host
def test_categories_of_other_names(host, tmp_path, caplog):
    sets = write(tmp_path, valid()), write(tmp_path, {**valid(), "categories": OTHERS}, "test")
    begin(host, cfg_of(host, *sets))
    words = "DATASETS.TEST: class 1 is 'wolf' in test, and 'dog' in mine of DATASETS.TRAIN"
    assert caplog.messages.count(words) == 1


@every_host
def test_categories_of_several_test_sets(host, tmp_path, caplog):
    """Each is evaluated by itself: another name is no error, and another order is one."""
    sets = [write(tmp_path, valid()), write(tmp_path, valid(), "test")]
    other = write(tmp_path, {**valid(), "categories": OTHERS}, "other")
    begin(host, cfg_of(host, *sets, other))
    words = "DATASETS.TEST: class 1 is 'wolf' in other, and 'dog' in test of DATASETS.TEST"
    assert caplog.messages.count(words) == 1
    swapped = write(tmp_path, {**valid(), "categories": SWAPPED}, "swapped")
    words = "class 0 is 'dog' in swapped, and 'cat' in test of DATASETS.TEST; give"
    with pytest.raises(InputError, match=words):
        begin(host, cfg_of(host, *sets, swapped))
