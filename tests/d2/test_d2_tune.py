"""Tuned detectors of Detectron2 train as the frozen ones."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial

import torch
from detectron2.engine import DefaultTrainer
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

import export
from bn_det import freeze, tune
from bn_det.d2 import BNHooks, TuneBN, register_datasets
from bn_det.d2.train import Trainer
from bn_det.layers.tuned import TunedConvWithNorm, TunedNorm
from d2_models import STOCK_RETINANET, make_cfg
from kinds import fill
from reference import BASE, RCNN_BASE, norm_opts

make_model = partial(export.make_model, "detectron2")

PER_LEVEL = [
    *("MODEL.RETINANET.BN.POPULATION", "per_domain", "MODEL.RETINANET.BN.AFFINE", "per_domain"),
]
DETECTORS = {
    "RetinaNet": ([BASE], 20 + 6 + 4),
    "RetinaNet, per level": ([BASE, *PER_LEVEL], 20 + 6 + 4),
    "stock RetinaNet": ([BASE, *STOCK_RETINANET], 20 + 6),  # and a cycle of layers in its head
    "stock RetinaNet, FrozenBN": ([BASE, *STOCK_RETINANET, *norm_opts("FrozenBN")], 20 + 6 + 4),
    "Mask R-CNN": ([RCNN_BASE, *norm_opts("BN")], 20 + 8 + 1 + 4),
    "Mask R-CNN, FrozenBN": ([RCNN_BASE, *norm_opts("FrozenBN")], 20 + 8 + 1 + 4),
}


def outputs_of(model):
    """Of backbone and heads, for random images and RoIs."""
    torch.manual_seed(4)
    features = model.backbone(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    if hasattr(model, "head"):
        return [y for ys in model.head(list(features.values())) for y in ys]
    rois = torch.randn(5, 64, 7, 7, dtype=torch.float64)
    heads = model.roi_heads.box_head(rois), model.roi_heads.mask_head.layers(rois)
    return [*features.values(), *heads]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_and_gradients(name, affine):
    opts, number = DETECTORS[name]
    frozen = freeze(make_model(*opts), affine=affine).double().train()
    tuned = copy.deepcopy(frozen)
    report = tune(tuned)
    assert len(report.tuned) == number
    assert all("not certain" in why for why in report.left.values())
    assert list(tuned.state_dict()) == list(frozen.state_dict())
    outputs = []
    for model in (tuned, frozen):
        outputs.append(outputs_of(model))
        sum(y.square().mean() for y in outputs[-1]).backward()
    for a, b in zip(*outputs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    for (key, p), q in zip(tuned.named_parameters(), frozen.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-8 * q.grad.abs().max() + 1e-12, key


def test_its_convolution():
    """With norm and activation inside, of which a plain list may hold it."""
    conv = Conv2d(4, 6, 3, padding=1, norm=FrozenBatchNorm2d(6), activation=nn.functional.relu)
    frozen = fill(nn.Sequential(conv)).double()
    tuned = copy.deepcopy(frozen)
    (held,) = tuned
    assert tune(tuned).tuned == ["0.norm"] and tuned[0] is held
    assert isinstance(held, (Conv2d, TunedConvWithNorm)) and isinstance(
        held.norm, FrozenBatchNorm2d
    )
    x = torch.randn(2, 4, 16, 12, dtype=torch.float64)
    grads = []
    for model in (tuned, frozen):
        y = model(x)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), model[0].weight)))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def num_tuned(model):
    return sum(isinstance(m, TunedNorm) for m in model.modules())


class Stock(DefaultTrainer):
    """A project's."""


class Mixed(BNHooks, Stock):
    pass


@pytest.mark.parametrize("kind", [Trainer, Mixed])
def test_by_a_config_key(kind, tiny_shapes, tmp_path, one_thread):
    """From the start what is frozen then, and the rest as it is frozen; the same checkpoints."""
    saved = []
    for is_tuned in ("False", "True"):
        cfg = make_cfg(
            *(BASE, *tiny_shapes, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"),
            *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()"),
            *("INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.FREEZE_BN_ITER", "2", "SEED", "1"),
            *("MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.TUNE_BN", is_tuned),
        )
        register_datasets(cfg)
        torch.manual_seed(1)
        trainer = kind(cfg)
        assert sum(isinstance(h, TuneBN) for h in trainer._hooks) == (is_tuned == "True")
        trainer.resume_or_load(resume=False)
        numbers = []
        step = trainer.run_step
        trainer.run_step = lambda step=step, of=trainer, n=numbers: (
            step(),
            n.append(num_tuned(of.model)),
        )
        trainer.train()
        assert numbers == ([5, 5, 30, 30] if is_tuned == "True" else [0] * 4)
        saved.append(torch.load(tmp_path / "model_final.pth", weights_only=False)["model"])
    assert list(saved[0]) == list(saved[1])
