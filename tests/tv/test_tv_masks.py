"""Masks on the torchvision host: loading, pasting, evaluation, and a whole run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from bn_det.config.load import load_config
from bn_det.data.coco import load_coco, registered_sources
from bn_det.data.masks import decode_mask
from bn_det.errors import InputError
from bn_det.tv import get_cfg
from bn_det.tv.data import build_test_loader, build_train_loader
from bn_det.tv.evaluation import METRICS, coco_metrics, evaluate, predict
from bn_det.tv.masks import crop_masks, paste_mask
from bn_det.tv.trainer import Trainer, load_datasets
from reference import BASE, RCNN, norm_opts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_cfg(tiny_shapes, tmp_path):
    def make(*opts):
        cfg = get_cfg()
        small = ["SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path)]
        opts = ["MODEL.DEVICE", "cpu", *RCNN, *tiny_shapes, *small, *opts]
        load_config(cfg, BASE, opts, "torchvision")
        return cfg

    return make


@pytest.fixture
def changed_set(make_cfg, tmp_path):
    """Options for a data set whose annotations a function has changed."""

    def change(function, split="train"):
        path = tmp_path / "changed.json"
        _, source, images = make_cfg().DATASETS.REGISTER_COCO[("train", "val").index(split)]
        content = json.loads(Path(source).read_text())
        function(content["annotations"])
        path.write_text(json.dumps(content))
        sets = repr([["changed", str(path), images]])
        names = {
            "TRAIN": "()",
            "TEST": "()",
            {"train": "TRAIN", "val": "TEST"}[split]: "('changed',)",
        }
        opts = [o for key, value in names.items() for o in (f"DATASETS.{key}", value)]
        return ["DATASETS.REGISTER_COCO", sets, *opts]

    return change


def of_image(dataset, record):
    """The true masks of an image by pycocotools, in the order of its annotations."""
    annotations = dataset.coco.imgToAnns[record["image_id"]]
    masks = np.stack([dataset.coco.annToMask(a) for a in annotations if not a["iscrowd"]])
    return torch.from_numpy(masks)


@pytest.mark.parametrize("flip, axis", [("horizontal", 2), ("vertical", 1)])
def test_masks_follow_flips(make_cfg, flip, axis):
    cfg = make_cfg("INPUT.RANDOM_FLIP", flip)
    (dataset,) = load_datasets(cfg, "TRAIN")
    flipped = set()
    for batch in build_train_loader(cfg, [dataset], seed=0, start_iter=0):
        for image, target, record in batch:
            expected = of_image(dataset, record)
            assert target["masks"].dtype == torch.uint8 and type(target["masks"]) is torch.Tensor
            flip = not torch.equal(target["masks"], expected)
            flipped.add(flip)
            assert torch.equal(target["masks"], expected.flip(axis) if flip else expected)
            plain = build_test_image(cfg, dataset, record)
            assert torch.equal(image, plain.flip(axis) if flip else plain)
    assert flipped == {True, False}


def build_test_image(cfg, dataset, record):
    for ((image, target, found),) in build_test_loader(cfg, dataset):
        assert "masks" not in target  # an evaluation does not need them
        if found["image_id"] == record["image_id"]:
            return image


def test_masks_follow_sizes(make_cfg):
    """Nearest neighbour: every second pixel."""
    cfg = make_cfg("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "(64,)")
    (dataset,) = load_datasets(cfg, "TRAIN")
    for batch in build_train_loader(cfg, [dataset], seed=0, start_iter=0):
        for _, target, record in batch:
            assert torch.equal(target["masks"], of_image(dataset, record)[:, ::2, ::2])
            areas = target["masks"].sum((1, 2))
            boxes = target["boxes"]
            assert (areas <= (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)).all()


def test_crowds_are_left_out(make_cfg, changed_set):
    """In training they need no mask; the other masks stay with their boxes."""

    def make_crowds(annotations):
        images = [a["image_id"] for a in annotations]
        for k, annotation in enumerate(annotations):
            # The first of each image that has others.
            if images.index(images[k]) == k and images.count(images[k]) > 1:
                annotation["iscrowd"] = 1
                del annotation["segmentation"]

    cfg = make_cfg(*changed_set(make_crowds), "INPUT.RANDOM_FLIP", "none")
    (dataset,) = load_datasets(cfg, "TRAIN")
    crowds = 0
    for batch in build_train_loader(cfg, [dataset], seed=0, start_iter=0):
        for _, target, record in batch:
            crowds += sum(a["iscrowd"] for a in record["annotations"])
            assert torch.equal(target["masks"], of_image(dataset, record))
            assert len(target["boxes"]) == len(target["masks"]) > 0
    assert crowds > 0


def test_boxes_without_an_area_are_left_out(make_cfg, changed_set):
    """With their masks."""

    def flatten(annotations):
        for annotation in annotations[::2]:
            annotation["bbox"][2] = 0.0

    cfg = make_cfg(*changed_set(flatten), "INPUT.RANDOM_FLIP", "none")
    (dataset,) = load_datasets(cfg, "TRAIN")
    for batch in build_train_loader(cfg, [dataset], seed=0, start_iter=0):
        for _, target, record in batch:
            proper = torch.tensor([a["bbox"][2] > 0 for a in record["annotations"]])
            assert torch.equal(target["masks"], of_image(dataset, record)[proper])
            assert len(target["boxes"]) == len(target["masks"])


def test_an_image_without_objects(make_cfg, changed_set):
    cfg = make_cfg(*changed_set(list.clear), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    loader = build_train_loader(cfg, load_datasets(cfg, "TRAIN"), seed=0, start_iter=0)
    shapes = {tuple(target["masks"].shape) for batch in loader for _, target, _ in batch}
    assert shapes == {(0, 128, 128)}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("value", [None, [], [[1.0, 2.0, 3.0, 4.0]]], ids=str)
def test_an_annotation_without_a_segmentation(make_cfg, changed_set, split, value):
    def remove(annotations):
        annotations[3]["segmentation"] = value
        if value is None:
            del annotations[3]["segmentation"]

    opts = changed_set(remove, split)
    key = {"train": "TRAIN", "val": "TEST"}[split]
    with pytest.raises(InputError, match="changed: .*: annotation 4: it has no segmentation"):
        load_datasets(make_cfg(*opts), key)
    load_datasets(make_cfg(*opts, "MODEL.MASK_ON", "False"), key)


def test_a_crowd_without_a_segmentation_cannot_be_evaluated(make_cfg, changed_set):
    def make_crowd(annotations):
        annotations[0]["iscrowd"] = 1
        del annotations[0]["segmentation"]

    with pytest.raises(InputError, match="annotation 1: it has no segmentation"):
        load_datasets(make_cfg(*changed_set(make_crowd, "val")), "TEST")


def test_a_mask_of_another_size(make_cfg, changed_set):
    def shrink(annotations):
        for annotation in annotations:
            annotation["segmentation"] = {"size": [64, 100], "counts": [0, 6400]}

    cfg = make_cfg(*changed_set(shrink))
    with pytest.raises(InputError, match=r"an RLE of size \[64, 100\] .* has \[128, 128\]"):
        load_datasets(cfg, "TRAIN")


def disc(size=128, center=(60.3, 70.8), radius=24.0):
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (((x - center[0]) ** 2 + (y - center[1]) ** 2) < radius**2).to(torch.uint8)


@pytest.mark.parametrize(
    "box", [(36.3, 46.8, 84.3, 94.8), (30.0, 40.0, 90.5, 99.9), (50.2, 20.1, 110.7, 74.9)]
)
def test_cropped_and_pasted(box):
    """What the box has of the mask comes back, but for a few pixels at the edges."""
    box = torch.tensor(box)
    mask = disc()
    pasted = paste_mask(crop_masks(mask[None], box[None], 28)[0], box, (128, 128)) >= 0.5
    x1, y1, x2, y2 = box.round().int().tolist()
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[y1:y2, x1:x2] = mask[y1:y2, x1:x2] > 0
    overlap = (pasted & expected).sum() / (pasted | expected).sum()
    assert overlap > 0.96


@pytest.mark.parametrize(
    "box, rows, columns",
    [
        ((10, 20, 38, 48), slice(20, 48), slice(10, 38)),
        ((-14, -7, 14, 21), slice(0, 21), slice(0, 14)),
        ((120, 100, 148, 128), slice(100, 128), slice(120, 128)),
        ((-28, 0, 0, 28), slice(0), slice(0)),
        ((200, 200, 228, 228), slice(0), slice(0)),
        ((5, 5, 5, 5), slice(0), slice(0)),
    ],
)
def test_a_full_mask_is_its_box(box, rows, columns):
    expected = torch.zeros(128, 128)
    expected[rows, columns] = 1
    pasted = paste_mask(torch.ones(28, 28), torch.tensor(box, dtype=torch.float32), (128, 128))
    assert torch.equal((pasted >= 0.5).float(), expected)


class Quarter(nn.Module):
    """Detects the upper left quarter of every image, whose left half is the mask."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        mask = torch.zeros(1, 1, 28, 28)
        mask[..., :14] = 1
        ends = [torch.tensor([i.shape[2], i.shape[1]]) * self.scale for i in images]
        found = {"labels": torch.tensor([2]), "scores": torch.ones(1), "masks": mask}
        return [{**found, "boxes": torch.cat([torch.zeros(2), e])[None]} for e in ends]


@pytest.mark.parametrize("size", ["64", "200", "0"])
def test_masks_come_back_in_the_original_size(make_cfg, size):
    cfg = make_cfg("INPUT.MIN_SIZE_TEST", size, "INPUT.MAX_SIZE_TEST", "300")
    (dataset,) = load_datasets(cfg, "TEST")
    found = predict(Quarter(), build_test_loader(cfg, dataset), dataset)
    expected = np.zeros((128, 128), dtype=np.uint8)
    expected[:64, :32] = 1
    assert len(found) == len(dataset.records)
    for prediction in found:
        assert prediction["bbox"] == pytest.approx([0, 0, 64, 64])
        np.testing.assert_array_equal(decode_mask(prediction["segmentation"], 128, 128), expected)
    json.dumps(found)


def noisy_predictions(dataset):
    """Nearly right: boxes moved a little, masks moved by whole pixels, some of another class."""
    rng = np.random.default_rng(0)
    predictions = []
    for a in dataset.coco.dataset["annotations"] * 2:
        mask = np.roll(dataset.coco.annToMask(a), rng.integers(-3, 4, 2), (0, 1))
        rle = coco_mask.encode(np.asfortranarray(mask))
        predictions.append(
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"] if rng.random() < 0.8 else 1,
                "bbox": (np.array(a["bbox"]) + rng.normal(0, 3, 4)).tolist(),
                "score": rng.random(),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return predictions


def by_hand(source, predictions, task):
    truth = COCO(source)
    evaluation = COCOeval(truth, truth.loadRes(predictions), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * np.where(evaluation.stats < 0, np.nan, evaluation.stats)[: len(METRICS)]


def test_imperfect_masks_equal_pycocotools(make_cfg):
    source = registered_sources(make_cfg())["tiny_val"]
    dataset = load_coco("tiny_val", source, for_evaluation=True, with_masks=True)
    predictions = noisy_predictions(dataset)
    kept = json.dumps(predictions)
    found = {t: list(coco_metrics(dataset, predictions, t).values())[:6] for t in ("bbox", "segm")}
    assert json.dumps(predictions) == kept
    assert 0 < found["segm"][0] < 100 and found["segm"] != found["bbox"]
    # pycocotools goes by the area of the box where there is one: give it each task's part alone.
    for task, unused in (("bbox", "segmentation"), ("segm", "bbox")):
        own = [{k: v for k, v in p.items() if k != unused} for p in predictions]
        np.testing.assert_array_equal(found[task], by_hand(source.json_file, own, task))


def test_a_whole_run(make_cfg, tmp_path):
    """Training and evaluation of Mask R-CNN, as tools/train_net.py does it; resumed, too."""
    cfg = make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001", "SOLVER.CHECKPOINT_PERIOD", "3")
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    # Not the norms, whose weights of 1 are too large for these steps to show in float32.
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.dim() > 1}
    results = trainer.train()
    after = dict(trainer.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]
    assert list(results) == ["bbox", "segm"]
    assert list(results["segm"]) == list(results["bbox"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"loss_mask", "loss_rpn_cls", "loss_box_reg"} <= {k for line in lines for k in line}
    assert {"bbox/AP", "segm/AP"} <= set(lines[-1])
    path = tmp_path / "inference" / "coco_instances_results.json"
    predictions = json.loads(path.read_text())
    assert set(predictions[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    resumed = Trainer(cfg)
    resumed.resume_or_load(True)
    np.testing.assert_equal(resumed.train(), results)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_learns_one_image(make_cfg, changed_set):
    """Boxes and masks of an image that is seen again and again."""

    def keep_one(annotations):
        annotations[:] = [a for a in annotations if a["image_id"] == 2]

    cfg = make_cfg(
        *(*changed_set(keep_one), *norm_opts("GN"), "SOLVER.IMS_PER_BATCH", "1"),
        *("MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", ""),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "5"),
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    dataset = load_coco("changed", registered_sources(cfg)["changed"], True, True)
    seen = dataset._replace(records=[r for r in dataset.records if r["annotations"]])
    loader = build_test_loader(cfg, seen)
    results = evaluate(trainer.model, loader, seen, cfg.OUTPUT_DIR, ("bbox", "segm"))
    assert results["bbox"]["AP50"] > 70 and results["segm"]["AP50"] > 70


def test_no_detections_at_all(make_cfg):
    cfg = make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.999", "SOLVER.MAX_ITER", "1")
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    results = trainer.train()
    assert np.isnan(results["bbox"]["AP"]) and np.isnan(results["segm"]["AP"])


def test_number_of_classes(make_cfg):
    with pytest.raises(InputError, match=r"MODEL.ROI_HEADS.NUM_CLASSES: 3 .* tiny_train .* 4 cat"):
        load_datasets(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", "3"), "TRAIN")
    load_datasets(make_cfg("MODEL.RETINANET.NUM_CLASSES", "3"), "TRAIN")
