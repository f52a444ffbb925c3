"""What a config means is the same on both hosts."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.config
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Boxes
from torch import nn

import bn_det.d2
from bn_det.config.keys import leaves
from bn_det.config.load import load_config
from bn_det.d2 import norms as d2_norms
from bn_det.data.coco import builtin_sources, load_coco, registered_sources
from bn_det.tv import build_model, get_cfg
from bn_det.tv import norms as tv_norms
from bn_det.tv import solver as tv_solver
from bn_det.tv.data import build_test_loader
from bn_det.tv.evaluation import coco_metrics
from here import run_here
from reference import BASE


def both_cfgs(*opts):
    ours, theirs = get_cfg(), detectron2.config.get_cfg()
    bn_det.d2.add_bn_det_config(theirs)
    for cfg, host in ((ours, "torchvision"), (theirs, "Detectron2")):
        load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", *opts], host)
    return ours, theirs


def test_defaults_are_detectron2s():
    theirs = detectron2.config.get_cfg()
    bn_det.d2.add_bn_det_config(theirs)
    expected = dict(leaves(theirs))
    for key, value in leaves(get_cfg()):
        assert expected[key] == value and type(expected[key]) is type(value), key


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
@pytest.mark.parametrize("warmup", [0, 7, 100])
def test_learning_rates(name, warmup):
    cfgs = both_cfgs(
        *("SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.WARMUP_ITERS", str(warmup)),
        *("SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "(20, 40, 70)", "SOLVER.GAMMA", "0.3"),
    )
    rates = []
    for cfg, build in zip(cfgs, (tv_solver.build_lr_scheduler, build_lr_scheduler), strict=True):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
        scheduler = build(cfg, optimizer)
        rates.append([])
        for _ in range(60):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


@pytest.mark.parametrize("offset", ["0.0", "0.5"])
def test_anchors(offset):
    ours, theirs = both_cfgs(
        *("MODEL.ANCHOR_GENERATOR.OFFSET", offset),
        *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0]]"),
    )
    model = build_model(ours)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    features = [torch.zeros(1, 64, h, w) for h, w in sizes]
    images, _ = model.transform([torch.zeros(3, 128, 192)])
    found = model.anchor_generator(images, features)[0]
    shapes = [ShapeSpec(channels=64, stride=8 * 2**k) for k in range(len(features))]
    expected = Boxes.cat(build_anchor_generator(theirs, shapes)(features)).tensor
    # Detectron2 orders the anchors of a cell by size first, torchvision by ratio.
    found = found.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)
    # torchvision rounds the anchors of a cell to half pixels.
    assert (found - expected).abs().max() <= 0.5


def test_records_are_detectron2s(tiny_shapes):
    _, cfg = both_cfgs(*tiny_shapes)
    bn_det.d2.register_datasets(cfg)
    found, metadata = DatasetCatalog.get("tiny_val"), MetadataCatalog.get("tiny_val")
    expected = load_coco_json(metadata.json_file, metadata.image_root, "their_tiny_val")
    assert found == expected
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(metadata, key) == getattr(MetadataCatalog.get("their_tiny_val"), key)


def test_builtin_names_lie_in_detectron2s_folders():
    for name, source in builtin_sources().items():
        metadata = MetadataCatalog.get(name)
        assert (metadata.json_file, metadata.image_root) == tuple(source)


def test_the_same_evaluation(tiny_shapes, tmp_path):
    """Detectron2's evaluator and ours, on the same detections."""
    from detectron2.data import build_detection_test_loader
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Instances

    ours, theirs = both_cfgs(*tiny_shapes)
    bn_det.d2.register_datasets(theirs)
    dataset = load_coco("tiny_val", registered_sources(ours)["tiny_val"])
    DatasetCatalog.get("tiny_val")
    evaluator = COCOEvaluator("tiny_val", output_dir=str(tmp_path))
    evaluator.reset()
    predictions = []
    for inputs in build_detection_test_loader(theirs, "tiny_val"):
        record = inputs[0]
        truth = next(r for r in dataset.records if r["image_id"] == record["image_id"])
        boxes = torch.tensor([a["bbox"] for a in truth["annotations"]])
        boxes = boxes + torch.randn_like(boxes) * 2
        instances = Instances((128, 128))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.scores = torch.rand(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in truth["annotations"]])
        evaluator.process(inputs, [{"instances": instances}])
        predictions += [
            {
                "image_id": record["image_id"],
                "category_id": dataset.category_ids[c],
                "bbox": b.tolist(),
                "score": s.item(),
            }
            for b, c, s in zip(boxes, instances.pred_classes, instances.scores, strict=True)
        ]
    expected = evaluator.evaluate()["bbox"]
    found = coco_metrics(dataset, predictions)
    assert list(found) == list(expected)
    # Box coordinates go through float32 sums on one side.
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-3, nan_ok=True)


def test_the_same_test_images(tiny_shapes):
    """Detectron2 resizes with PIL, torchvision with its own antialiased kernel."""
    from detectron2.data import build_detection_test_loader

    ours, theirs = both_cfgs(*tiny_shapes, "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "96")
    bn_det.d2.register_datasets(theirs)
    dataset = load_coco("tiny_val", registered_sources(ours)["tiny_val"])
    for ((image, _, _),), inputs in zip(
        build_test_loader(ours, dataset),
        build_detection_test_loader(theirs, "tiny_val", num_workers=0),
        strict=True,
    ):
        assert image.shape == inputs[0]["image"].shape
        assert (image - inputs[0]["image"].float()).abs().max() <= 2


@pytest.mark.parametrize("name", sorted(d2_norms.NORMS))
def test_norms_without_a_batch(name):
    assert set(d2_norms.NORMS) == set(tv_norms.NORMS)
    x = torch.randn(2, 64, 5, 4) * 3 + 1
    ours, theirs = tv_norms.NORMS[name](64), d2_norms.NORMS[name](64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours.eps == theirs.eps


@pytest.mark.parametrize("host", ["torchvision", "detectron2"])
def test_two_test_sets(host, tiny_shapes, tmp_path):
    """Each has its results, and its own file of detections."""
    both = [o if o != "('tiny_val',)" else "('tiny_val', 'tiny_train')" for o in tiny_shapes]
    done = run_here(
        "tools/train_net.py",
        *("--host", host, "--config-file", BASE, *both),
        *("OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cpu"),
        *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.001"),
    )
    assert done.returncode == 0, done.stderr
    tail = done.stdout[done.stdout.rindex("Data set tiny_val") :]
    assert "Data set tiny_train" in tail and tail.count("Evaluation results for bbox:") == 2
    for name in ("tiny_val", "tiny_train"):
        assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()
