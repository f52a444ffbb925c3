"""The torchvision host's loop, data order, checkpoints and evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from bn_det.config.load import load_config
from bn_det.data.coco import load_coco, registered_sources
from bn_det.errors import InputError, one_line
from bn_det.training.hooks import Hook
from bn_det.tv import get_cfg
from bn_det.tv.data import build_test_loader, build_train_loader
from bn_det.tv.evaluation import coco_metrics, predict
from bn_det.tv.trainer import Trainer, load_datasets
from reference import BASE, norm_opts


@pytest.fixture
def make_cfg(tiny_shapes, tmp_path):
    def make(*opts):
        cfg = get_cfg()
        small = ["SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path)]
        small += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
        opts = ["MODEL.DEVICE", "cpu", *tiny_shapes, *small, *opts]
        load_config(cfg, BASE, opts, "torchvision")
        return cfg

    return make


NO_TEST = ["DATASETS.TEST", "()"]


def train(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer, trainer.train()


def flat(batches):
    return [
        (record["image_id"], image.tolist(), target["boxes"].tolist())
        for batch in batches
        for image, target, record in batch
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_order_is_the_seeds_alone(make_cfg, num_workers):
    cfg = make_cfg("DATALOADER.NUM_WORKERS", str(num_workers), "INPUT.MIN_SIZE_TRAIN", "(64, 96)")
    datasets = load_datasets(cfg, "TRAIN")
    torch.manual_seed(1)
    whole = flat(build_train_loader(cfg, datasets, seed=5, start_iter=0))
    torch.manual_seed(2)
    rest = flat(build_train_loader(cfg, datasets, seed=5, start_iter=4))
    assert len(whole) == 12 and rest == whole[8:]
    assert sorted(i for i, _, _ in whole) == list(range(1, 13))  # an epoch is a permutation
    other = flat(build_train_loader(cfg, datasets, seed=6, start_iter=0))
    assert [i for i, _, _ in other] != [i for i, _, _ in whole]


def test_samples(make_cfg):
    """Pixels in BGR from 0 to 255, boxes that follow flips and sizes."""
    cfg = make_cfg("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", "(64,)")
    (dataset,) = load_datasets(cfg, "TRAIN")
    plain = build_test_loader(make_cfg("INPUT.MIN_SIZE_TEST", "64"), dataset)
    references = {record["image_id"]: (image, target) for ((image, target, record),) in plain}
    flipped = set()
    batches = build_train_loader(cfg, [dataset], seed=0, start_iter=0)
    for image, target, record in (sample for batch in batches for sample in batch):
        expected, expected_target = references[record["image_id"]]
        boxes = expected_target["boxes"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and image.max() > 1
        flip = not torch.equal(image, expected)
        flipped.add(flip)
        if flip:
            expected = expected.flip(2)
            boxes = torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], 1)
        torch.testing.assert_close(image, expected)
        torch.testing.assert_close(target["boxes"], boxes)
        original = torch.tensor([a["bbox"] for a in record["annotations"]])
        torch.testing.assert_close(
            (boxes[:, 2:] - boxes[:, :2]).sort(0).values, (original[:, 2:] / 2).sort(0).values
        )
    assert flipped == {True, False}


def test_channel_order(make_cfg):
    cfg = make_cfg()
    (dataset,) = load_datasets(cfg, "TRAIN")
    ((bgr, _, _),) = next(iter(build_test_loader(cfg, dataset)))
    ((rgb, _, _),) = next(iter(build_test_loader(make_cfg("INPUT.FORMAT", "RGB"), dataset)))
    assert torch.equal(bgr.flip(0), rgb) and not torch.equal(bgr, rgb)


def test_writes_what_detectron2_users_expect(make_cfg, tmp_path):
    cfg = make_cfg("SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "3")
    _, results = train(cfg)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert {p.name for p in tmp_path.glob("*.pth")} == {"model_0000003.pth", "model_final.pth"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    evaluations = [line for line in lines if "bbox/AP" in line]
    assert [line["iteration"] for line in evaluations] == [2, 5]
    assert {"AP", "AP50", "APs", "AP-circle"} <= set(results["bbox"])
    (training,) = [line for line in lines if "total_loss" in line]
    assert {"loss_cls", "loss_box_reg", "lr", "time", "data_time", "eta_seconds"} <= set(training)
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_run_ends_with_the_same_weights(make_cfg, tmp_path, num_workers):
    opts = ["DATALOADER.NUM_WORKERS", str(num_workers), "SOLVER.CHECKPOINT_PERIOD", "2"]
    opts += [*NO_TEST, "SEED", "-1"]
    whole, results = train(make_cfg(*opts))
    assert results == {}
    # As after a kill -9 between iterations 3 and 4: the file of iteration 3 is the last.
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    torch.manual_seed(99)
    resumed, _ = train(make_cfg(*opts), resume=True)
    assert resumed.seed == whole.seed
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_resuming_a_finished_run_evaluates(make_cfg, tmp_path):
    """As after a kill during the last evaluation."""
    cfg = make_cfg("SOLVER.MAX_ITER", "2", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.001")
    first, expected = train(cfg)
    again, results = train(cfg, resume=True)
    np.testing.assert_equal(results, expected)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 1]
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_equals_pycocotools_by_hand(make_cfg, tmp_path):
    cfg = make_cfg("MODEL.RETINANET.SCORE_THRESH_TEST", "0.001", "SOLVER.MAX_ITER", "2")
    _, results = train(cfg)
    truth = COCO(registered_sources(cfg)["tiny_val"].json_file)
    path = tmp_path / "inference" / "coco_instances_results.json"
    evaluation = COCOeval(truth, truth.loadRes(str(path)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    found = [results["bbox"][n] for n in names]
    expected = [100 * s if s >= 0 else float("nan") for s in evaluation.stats[:6]]
    np.testing.assert_array_equal(found, expected)


def test_imperfect_predictions_equal_pycocotools(make_cfg, tmp_path):
    """The same on detections that are nearly right, where no number is zero by chance."""
    dataset = load_coco("tiny_val", registered_sources(make_cfg())["tiny_val"])
    rng = np.random.default_rng(0)
    predictions = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"] if rng.random() < 0.8 else 1,
            "bbox": (np.array(a["bbox"]) + rng.normal(0, 3, 4)).tolist(),
            "score": rng.random(),
        }
        for a in dataset.coco.dataset["annotations"] * 2
    ]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(predictions))
    truth = COCO(registered_sources(make_cfg())["tiny_val"].json_file)
    evaluation = COCOeval(truth, truth.loadRes(str(path)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    found = list(coco_metrics(dataset, predictions).values())[:6]
    assert 0 < found[0] < 100
    np.testing.assert_array_equal(
        found, 100 * np.where(evaluation.stats < 0, np.nan, evaluation.stats)[:6]
    )


def test_perfect_and_missing_predictions(make_cfg):
    cfg = make_cfg()
    dataset = load_coco("tiny_val", registered_sources(cfg)["tiny_val"])
    truth = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in dataset.coco.dataset["annotations"]
    ]
    metrics = coco_metrics(dataset, truth)
    assert metrics["AP"] == pytest.approx(100)
    present = {a["category_id"] for a in truth}
    for category_id, name in zip(dataset.category_ids, dataset.category_names, strict=True):
        assert metrics[f"AP-{name}"] == pytest.approx(
            100 if category_id in present else float("nan"), nan_ok=True
        )
    assert all(np.isnan(v) for v in coco_metrics(dataset, []).values())


class HalfOfTheImage(nn.Module):
    """Detects the upper left quarter of every image, in the pixels that it is given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        ends = [torch.tensor([i.shape[2], i.shape[1]]) * self.scale for i in images]
        boxes = [torch.cat([torch.zeros(2), e])[None] for e in ends]
        return [{"boxes": b, "labels": torch.tensor([2]), "scores": torch.ones(1)} for b in boxes]


@pytest.mark.parametrize("size", ["64", "200", "0"])
def test_boxes_come_back_in_the_original_size(make_cfg, size):
    """Detections of a resized image are in the pixels of the file."""
    cfg = make_cfg("INPUT.MIN_SIZE_TEST", size, "INPUT.MAX_SIZE_TEST", "300")
    (dataset,) = load_datasets(cfg, "TEST")
    model = HalfOfTheImage()
    found = predict(model, build_test_loader(cfg, dataset), dataset)
    assert model.training and len(found) == len(dataset.records)
    for prediction in found:
        assert prediction["bbox"] == pytest.approx([0, 0, 64, 64])
        assert prediction["category_id"] == dataset.category_ids[2]


def test_nothing_to_resume(make_cfg, tmp_path):
    """As Detectron2's it begins from MODEL.WEIGHTS then, of which some may begin anew."""
    trainer = Trainer(make_cfg(*NO_TEST))
    state = {n: v for n, v in trainer.model.state_dict().items() if n.startswith("backbone")}
    first = next(name for name, value in state.items() if value.is_floating_point())
    state[first] = torch.full_like(state[first], 0.5)
    torch.save(state, tmp_path / "backbone.pth")
    trainer = Trainer(make_cfg("MODEL.WEIGHTS", str(tmp_path / "backbone.pth"), *NO_TEST))
    trainer.resume_or_load(True)
    assert trainer.iter == -1 and torch.equal(trainer.model.state_dict()[first], state[first])


def test_loss_that_is_not_finite(make_cfg):
    trainer = Trainer(make_cfg("SOLVER.BASE_LR", "1e30", *NO_TEST))
    trainer.resume_or_load(False)
    with pytest.raises(FloatingPointError, match="iteration"):
        trainer.train()


def test_no_detections_at_all(make_cfg):
    _, results = train(make_cfg("MODEL.RETINANET.SCORE_THRESH_TEST", "0.999"))
    assert np.isnan(results["bbox"]["AP"])


def test_data_that_does_not_go_together(make_cfg, tmp_path):
    cfg = make_cfg()
    name, path, images = cfg.DATASETS.REGISTER_COCO[0]
    content = json.loads(Path(path).read_text())
    content["categories"][0]["name"] = "disc"
    (tmp_path / "other.json").write_text(json.dumps(content))
    sets = [[name, path, images], ["other", str(tmp_path / "other.json"), images]]
    both = make_cfg("DATASETS.REGISTER_COCO", repr(sets), "DATASETS.TRAIN", f"('{name}', 'other')")
    with pytest.raises(InputError, match="DATASETS.TRAIN: .* different categories.*disc"):
        load_datasets(both, "TRAIN")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_used(make_cfg, tmp_path, num_workers):
    cfg = make_cfg("DATALOADER.NUM_WORKERS", str(num_workers))
    (dataset,) = load_datasets(cfg, "TEST")
    record = dataset.records[0]
    for change, message in [
        ({"file_name": str(tmp_path / "none.png")}, "none.png: there is no such image"),
        ({"height": 5}, "is 128x128 pixels, its annotation says 128x5"),
    ]:
        dataset.records[0] = {**record, **change}
        with pytest.raises(InputError) as e:
            next(iter(build_test_loader(cfg, dataset)))
        assert one_line(e.value).endswith(message)
        assert one_line(e.value).startswith("/")


def weights_and_statistics(trainer):
    state = trainer.model.state_dict()
    statistics = {k: v.clone() for k, v in state.items() if "running" in k}
    return {k: v.clone() for k, v in state.items() if k not in statistics}, statistics


def test_precise_bn(make_cfg, tmp_path):
    """Other statistics, which all checkpoints have; the training itself is the same."""
    plain, _ = train(make_cfg("OUTPUT_DIR", str(tmp_path / "plain"), *NO_TEST))
    opts = [*NO_TEST, "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "5"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "4", "TEST.PRECISE_BN.IMS_PER_BATCH", "3"]
    trainer, _ = train(make_cfg(*opts))
    expected, ema = weights_and_statistics(plain)
    weights, statistics = weights_and_statistics(trainer)
    assert all(torch.equal(v, expected[k]) for k, v in weights.items())
    assert not any(torch.equal(v, ema[k]) for k, v in statistics.items())
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in statistics.items())
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    reports = [line for line in lines if "precise_bn/error" in line]
    assert [r["iteration"] for r in reports] == [3, 5]
    assert all(r["precise_bn/num_samples"] == 15 for r in reports)
    # From a checkpoint in between, the same to the bit.
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    resumed, _ = train(make_cfg(*opts), resume=True)
    assert all(torch.equal(v, statistics[k]) for k, v in weights_and_statistics(resumed)[1].items())


@pytest.mark.parametrize("precise", ["True", "False"])
def test_frozen_bn(make_cfg, tmp_path, precise):
    opts = ["SOLVER.FREEZE_BN_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1"]
    opts += ["SOLVER.FREEZE_BN_PRECISE", precise, "TEST.PRECISE_BN.NUM_ITER", "2", *NO_TEST]
    train(make_cfg(*opts, "SOLVER.FREEZE_BN_AFFINE", "True"))
    saved = [
        torch.load(tmp_path / f"model_{k:07d}.pth", weights_only=True)["model"] for k in range(6)
    ]
    norms = [k for k in saved[0] if k.endswith("running_mean")]
    frozen = [k.replace("running_mean", n) for k in norms for n in ("running_mean", "running_var")]
    for name in frozen:
        assert torch.equal(saved[3][name], saved[5][name])
        assert torch.equal(saved[2][name], saved[3][name]) == (precise == "False")
    affine = [k.replace("running_mean", "weight") for k in norms]
    for name in (k for k in affine if k in saved[0]):
        assert torch.equal(saved[2][name], saved[5][name])
    assert not torch.equal(
        saved[2]["backbone.body.conv1.weight"], saved[5]["backbone.body.conv1.weight"]
    )


def test_frozen_modules(make_cfg, tmp_path):
    """By name or pattern, from the start; what is named and not there is told before it."""
    opts = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.FREEZE_BN_AFFINE", "True", *NO_TEST]
    names = "('backbone.body.bn1', 'backbone.body.layer[12]')"
    train(make_cfg(*opts, "SOLVER.FREEZE_BN_MODULES", names))
    saved = [
        torch.load(tmp_path / f"model_{k:07d}.pth", weights_only=True)["model"] for k in (0, 5)
    ]
    parts = ("backbone.body.bn1.", "backbone.body.layer1.", "backbone.body.layer2.")
    for name in (k for k in saved[0] if k.endswith(("running_mean", "bn1.weight"))):
        assert torch.equal(saved[0][name], saved[1][name]) == name.startswith(parts), name
    with pytest.raises(InputError, match="no BatchNorm in 'backbone.body.layer5', .* nearest"):
        train(make_cfg(*opts, "SOLVER.FREEZE_BN_MODULES", "('backbone.body.layer5',)"))


def test_virtual_images(make_cfg, tmp_path):
    """Each step's statistics are of its images and the extra ones; a resumed run has the same."""
    opts = ["SOLVER.VIRTUAL_IMAGES", "3", "SOLVER.CHECKPOINT_PERIOD", "4", *NO_TEST]
    trainer = Trainer(make_cfg(*opts))
    first = trainer.model.backbone.body.bn1
    seen, means = [], []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.register_hooks([after := Hook()])
    after.after_step = lambda: means.append(first.running_mean.clone())
    trainer.train()
    assert [len(x) for x in seen] == [3, 2] * 6
    assert [x.requires_grad for x in seen] == [False, True] * 6
    mean = torch.zeros_like(means[0])
    for extra, images, found in zip(seen[::2], seen[1::2], means, strict=True):
        mean = 0.9 * mean + 0.1 * torch.cat([extra, images]).mean((0, 2, 3))
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)
    assert first.num_batches_tracked == 6
    final = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    resumed, _ = train(make_cfg(*opts), resume=True)
    assert all(torch.equal(v, final[k]) for k, v in resumed.model.state_dict().items())


def test_accumulation(make_cfg, tmp_path):
    """An iteration is a step of several batches, for the schedule, too, and for --resume."""
    opts = ["SOLVER.ACCUMULATE", "3", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.CHECKPOINT_PERIOD", "4"]
    opts += ["MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "shared"]
    trainer = Trainer(make_cfg(*opts, *NO_TEST))
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    trainer.train()
    assert seen == [1] * 18
    assert trainer.scheduler.last_epoch == 6
    final = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert final["backbone.body.bn1.num_batches_tracked"] == 18
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    resumed, _ = train(make_cfg(*opts, *NO_TEST), resume=True)
    assert all(torch.equal(v, final[k]) for k, v in resumed.model.state_dict().items())


def test_accumulation_equals_the_large_batch(make_cfg, tmp_path):
    """Without BatchNorm: RetinaNet's losses are means over images on this host. To 1e-6."""
    opts = [*norm_opts("FrozenBN"), "SOLVER.MAX_ITER", "2", *NO_TEST]
    large, _ = train(make_cfg(*opts, "SOLVER.IMS_PER_BATCH", "4"))
    opts += ["OUTPUT_DIR", str(tmp_path / "accumulated"), "SOLVER.ACCUMULATE", "4"]
    accumulated, _ = train(make_cfg(*opts, "SOLVER.IMS_PER_BATCH", "1"))
    for name, value in accumulated.model.state_dict().items():
        torch.testing.assert_close(value, large.model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_virtual_images_and_frozen_bn(make_cfg):
    """From the iteration of freezing on there is nothing to extend."""
    opts = ["SOLVER.VIRTUAL_IMAGES", "2", "SOLVER.FREEZE_BN_ITER", "3", *NO_TEST]
    train(make_cfg(*opts, "TEST.PRECISE_BN.NUM_ITER", "2"))


def test_adaptive_gradient_clipping(make_cfg):
    """A step moves no unit by more than its part, but those of the final predictors."""
    opts = [
        "SOLVER.AGC.ENABLED",
        "True",
        "SOLVER.AGC.CLIP_FACTOR",
        "0.0001",
        "SOLVER.MAX_ITER",
        "1",
    ]
    opts += ["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "1.0"]
    opts += NO_TEST
    trainer = Trainer(make_cfg(*opts))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = set()
    for name, p in trainer.model.named_parameters():
        units = (1, -1) if p.dim() <= 1 else (len(p), -1)
        step, weight = ((t.reshape(units).norm(dim=1)) for t in (p - before[name], before[name]))
        if (step > 1.01e-4 * weight.clamp(min=1e-3) + 1e-6).any():
            moved.add(name.split(".")[-2])
    assert moved == {"cls_logits", "bbox_reg"}


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.AGC.EPS", "0.0"], "SOLVER.AGC.EPS: 0.0 is not accepted; use more than 0.0"),
        (["SOLVER.ACCUMULATE", "0"], "SOLVER.ACCUMULATE: 0 is not accepted; use 1 to"),
        (
            ["SOLVER.ACCUMULATE", "2", "SOLVER.VIRTUAL_IMAGES", "2"],
            "SOLVER.VIRTUAL_IMAGES: 2 is not accepted with SOLVER.ACCUMULATE 2",
        ),
        (
            ["SOLVER.ACCUMULATE", "4", "SOLVER.MAX_ITER", "9", "SOLVER.FREEZE_BN_ITER", "9"],
            "SOLVER.FREEZE_BN_ITER: 9 is not accepted with SOLVER.ACCUMULATE 4 .*MAX_ITER 9",
        ),
        (
            [
                *("SOLVER.VIRTUAL_IMAGES", "2", "SOLVER.UPDATE_POPULATION", "False"),
                *("SOLVER.BN_STATISTICS", "population"),
            ],
            "SOLVER.VIRTUAL_IMAGES: 2 is not accepted with .*UPDATE_POPULATION False",
        ),
        (["SOLVER.VIRTUAL_IMAGES", "-1"], "SOLVER.VIRTUAL_IMAGES: -1 is not accepted; use 0 to"),
        (
            ["SOLVER.VIRTUAL_IMAGES", "2", *norm_opts("FrozenBN")],
            "SOLVER.VIRTUAL_IMAGES: 2 is not accepted: no part of the model has a batch",
        ),
    ],
)
def test_steps_that_cannot_be(make_cfg, opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg(*opts)
