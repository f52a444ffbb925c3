"""update_bn_stats on Detectron2's models and layers."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
import itertools
import json

import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.layers.batch_norm import CycleBatchNormList, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from bn_det import DomainBatchNorm2d, update_bn_stats
from bn_det.config.load import load_config
from bn_det.d2 import FreezeBN, PreciseBN, add_bn_det_config, register_datasets
from bn_det.d2.train import Trainer
from bn_det.errors import InputError
from reference import BASE, RCNN, values

pytestmark = pytest.mark.usefixtures("one_thread")

STOCK = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
]
LEVELS = [
    *("MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "per_domain"),
]


def make_model(*opts):
    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", *opts], "Detectron2")
    torch.manual_seed(0)
    return build_model(cfg).train()


def make_batches(sizes):
    """Images with two objects each; of the last batch, without any."""
    batches = []
    for index, num in enumerate(sizes):
        instances = Instances((128, 128))
        boxes = [[5.0, 8, 40, 45], [30, 30, 110, 105]] if index < len(sizes) - 1 else []
        instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        instances.gt_classes = torch.tensor([0, 3])[: len(boxes)]
        instances.gt_masks = BitMasks(torch.ones(len(boxes), 128, 128, dtype=torch.bool))
        batches.append(
            [
                {"image": torch.randint(0, 256, (3, 128, 128)), "instances": copy.copy(instances)}
                for _ in range(num)
            ]
        )
    return batches


def record_inputs(model):
    """The inputs of each place of statistics, by name, as the model is called from now on."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, DomainBatchNorm2d):

            def take(m, args, name=name):
                for k, x in enumerate(args[0]):
                    part = f".{k}" if m.population == "per_domain" else ""
                    seen.setdefault(name + part, []).append(x)

            handles.append(module.register_forward_pre_hook(take))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: seen.setdefault(name, []).append(args[0])
                )
            )
    return seen, handles


RPN_LEVELS = [*RCNN, "MODEL.RPN.HEAD_NAME", "BNRPNHead", "MODEL.RPN.NORM", "BN"]
FCOS_LEVELS = [
    *(
        "MODEL.META_ARCHITECTURE",
        "BNFCOS",
        "MODEL.BN_FCOS.NORM",
        "BN",
        "MODEL.BN_FCOS.NUM_CLASSES",
        "4",
    ),
    *("MODEL.BACKBONE.NAME", "build_bn_fcos_resnet_fpn_backbone", "MODEL.BN_FCOS.NUM_CONVS", "1"),
]
DETECTORS = {
    "stock": STOCK, "ours": [], "levels": LEVELS, "rcnn": RCNN, "rpn": RPN_LEVELS,
    "fcos": FCOS_LEVELS,
}  # fmt: skip


@pytest.mark.parametrize("opts", DETECTORS.values(), ids=DETECTORS)
def test_detectors(opts):
    model, batches = make_model(*opts), make_batches((2, 3, 2, 4, 2, 3))
    before = copy.deepcopy(model.state_dict())
    seen, handles = record_inputs(model)
    with EventStorage(7) as storage:
        report = update_bn_stats(model, batches, len(batches))
    for handle in handles:
        handle.remove()
    assert not storage.latest() and storage.iter == 7
    assert not report.unused
    assert {of.name for of in report.layers} == set(seen)
    for name, inputs in seen.items():
        every = values([x.double() for x in inputs if x.numel()])
        mean, var = every.mean(0), every.var(0, correction=0)
        bn = model.get_submodule(name)
        # Float32's rounding of sums of some thousand values.
        assert ((bn.running_mean.double() - mean).abs() <= 1e-6 * var.sqrt() + 1e-9).all(), name
        assert ((bn.running_var.double() - var).abs() <= 1e-6 * var + 1e-9).all(), name
    for name, value in model.state_dict().items():
        assert "running" in name or torch.equal(value, before[name]), name
    assert all(not m._pos for m in model.modules() if isinstance(m, CycleBatchNormList))
    if hasattr(model, "loss_normalizer"):
        assert model.loss_normalizer == 100


@pytest.mark.parametrize("opts", [STOCK, []], ids=["stock", "ours"])
def test_layers_see_what_they_see_in_training(opts):
    model, batches = make_model(*opts), make_batches((3, 2))
    training = copy.deepcopy(model)
    expected, _ = record_inputs(training)
    with torch.no_grad(), EventStorage():
        for batch in batches:
            training(batch)
    seen, _ = record_inputs(model)
    update_bn_stats(model, batches, 2)
    for name, inputs in seen.items():
        for x, y in zip(inputs, expected[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # after 25 layers of float32


def test_the_losses_are_not_computed():
    """But in passes 1, 2 and 4."""
    model, batches = make_model(), make_batches((2,) * 7)
    calls, losses = [], model.losses
    model.losses = lambda *args: calls.append(1) or losses(*args)
    update_bn_stats(model, batches, 7)
    assert len(calls) == 3


def test_a_failing_pass_leaves_the_position_in_the_cycle():
    model, batches = make_model(*STOCK), make_batches((2, 2, 2))
    positions = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    before = copy.deepcopy(model.state_dict())
    batches[1][0]["image"] = torch.randint(0, 256, (4, 128, 128))
    with pytest.raises(RuntimeError):
        update_bn_stats(model, batches, 3)
    handle = positions[1][3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update_bn_stats(model, batches[2:], 1)
    handle.remove()
    assert positions and not any(m._pos for m in positions)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_naive_sync_batch_norm():
    bn = nn.Sequential(nn.Conv2d(3, 4, 1), NaiveSyncBatchNorm(4))
    batches = [torch.randn(n, 3, 5, 6) for n in (3, 1, 4)]
    update_bn_stats(bn, itertools.cycle(batches), 6)
    with torch.no_grad():
        every = values([bn[0](x).double() for x in batches])
    torch.testing.assert_close(bn[1].running_mean.double(), every.mean(0))
    torch.testing.assert_close(bn[1].running_var.double(), every.var(0, correction=0))
    assert bn[1].num_batches_tracked == 0


@pytest.fixture
def train(tiny_shapes, tmp_path):
    """Trains six iterations; returns weights, statistics and what metrics.json says."""

    def run(name, *opts, trainer_class=Trainer):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        cfg = get_cfg()
        add_bn_det_config(cfg)
        small = ["SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(folder)]
        opts = ["MODEL.DEVICE", "cpu", *tiny_shapes, *small, *opts]
        load_config(cfg, BASE, opts, "Detectron2")
        register_datasets(cfg)
        seed_all_rng(1)
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        state = trainer.model.state_dict()
        statistics = {k: v.clone() for k, v in state.items() if "running" in k}
        lines = [json.loads(li) for li in (folder / "metrics.json").read_text().splitlines()]
        return {k: v for k, v in state.items() if k not in statistics}, statistics, lines

    return run


PRECISE = [
    *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "9"),
    *("SOLVER.CHECKPOINT_PERIOD", "4", "TEST.PRECISE_BN.IMS_PER_BATCH", "3"),
]


def test_hook(train, tmp_path):
    """Other statistics, which the checkpoint has; the training itself is the same."""
    train("first")  # torch 2.15 rounds otherwise in the first training of a process
    expected, ema, _ = train("plain")
    weights, statistics, lines = train("precise", *PRECISE)
    assert all(torch.equal(v, expected[k]) for k, v in weights.items())
    assert not any(torch.equal(v, ema[k]) for k, v in statistics.items())
    saved = torch.load(tmp_path / "precise" / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in statistics.items())
    (report,) = [line for line in lines if "precise_bn/error" in line]
    assert report["iteration"] == 5 and report["precise_bn/num_samples"] == 27


class Unmodified(DefaultTrainer):
    """As in a project that uses nothing of ours but the hooks."""

    def build_hooks(self):
        ret = super().build_hooks()
        cfg = self.cfg
        ret.insert(2, FreezeBN(3, affine=True))
        ret.insert(2, PreciseBN([4], self.model, self.build_train_loader(cfg), num_iter=9))
        return ret

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def test_hooks_in_an_unmodified_default_trainer(train, tmp_path):
    opts = ["SOLVER.CHECKPOINT_PERIOD", "1"]
    weights, statistics, _ = train("default", *opts, trainer_class=Unmodified)
    saved = [
        torch.load(tmp_path / "default" / f"model_{k:07d}.pth", weights_only=False)["model"]
        for k in range(5)
    ]
    assert all(torch.equal(v, saved[2][k]) for k, v in statistics.items())
    moved = {k for k, v in weights.items() if not torch.equal(v, saved[2][k])}
    assert any("conv1.weight" in k for k in moved) and not any("norm" in k for k in moved)


def test_virtual_images(train):
    """The steps' statistics are of more images; nothing else of the extra ones is seen."""
    expected, ema, _ = train("plain", "SOLVER.MAX_ITER", "1")
    weights, statistics, lines = train(
        "virtual", "SOLVER.MAX_ITER", "1", "SOLVER.VIRTUAL_IMAGES", "3"
    )
    tracked = [v for k, v in weights.items() if k.endswith("num_batches_tracked")]
    assert tracked and all(v == 1 for v in tracked)
    assert not any(torch.equal(v, ema[k]) for k, v in statistics.items())
    assert any("total_loss" in line for line in lines)
    assert not all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_accumulation(train):
    """Two batches a step, of which each is a normalization batch."""
    opts = ["SOLVER.MAX_ITER", "3", "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "1"]
    shared = ["MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "shared"]
    weights, _, lines = train("accumulated", *opts, *shared)
    tracked = [v for k, v in weights.items() if k.endswith("num_batches_tracked")]
    assert tracked and all(v == 6 for v in tracked)
    assert max(line["iteration"] for line in lines if "total_loss" in line) == 2


def test_adaptive_gradient_clipping(train):
    """It changes the step, and not together with the clipping that Detectron2 has."""
    opts = ["SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0"]
    expected, _, _ = train("plain", *opts)
    agc = ["SOLVER.AGC.ENABLED", "True", "SOLVER.AGC.CLIP_FACTOR", "0.0001"]
    weights, _, _ = train("clipped", *opts, *agc)
    assert not torch.equal(
        weights["backbone.fpn_lateral3.weight"], expected["backbone.fpn_lateral3.weight"]
    )
    torch.testing.assert_close(weights["head.cls_score.weight"], expected["head.cls_score.weight"])
    with pytest.raises(
        InputError, match="SOLVER.AGC.ENABLED: True is not accepted with SOLVER.CLIP"
    ):
        train("both", *agc, "SOLVER.CLIP_GRADIENTS.ENABLED", "True")


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_frozen_bn(train, tmp_path, enabled):
    """Recomputed right before, and never again; the evaluations find frozen layers."""
    opts = ["SOLVER.FREEZE_BN_ITER", "3", *PRECISE, "SOLVER.CHECKPOINT_PERIOD", "1"]
    _, statistics, _ = train("frozen", *opts, "TEST.PRECISE_BN.ENABLED", enabled)
    saved = [
        torch.load(tmp_path / "frozen" / f"model_{k:07d}.pth", weights_only=False)["model"]
        for k in (2, 3)
    ]
    assert all(torch.equal(v, saved[1][k]) for k, v in statistics.items())
    # With PreciseBN at every checkpoint the last one is right before freezing.
    same = [torch.equal(v, saved[0][k]) for k, v in statistics.items()]
    assert all(same) if enabled == "True" else not any(same)
