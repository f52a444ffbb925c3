"""Tuned detectors of torchvision train as the frozen ones."""

import copy
from functools import partial

import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import FrozenBatchNorm2d

import export
from bn_det import freeze, tune
from bn_det.layers.tuned import TunedNorm
from bn_det.tv.trainer import Trainer
from hosts import make_cfg
from reference import BASE, RCNN_BASE, norm_opts

make_model = partial(export.make_model, "torchvision")

PER_LEVEL = [
    *("MODEL.RETINANET.BN.POPULATION", "per_domain", "MODEL.RETINANET.BN.AFFINE", "per_domain"),
]
DETECTORS = {
    "RetinaNet": ([BASE], 20 + 6 + 4),
    "RetinaNet, per level": ([BASE, *PER_LEVEL], 20 + 6 + 4),
    "Mask R-CNN": ([RCNN_BASE, *norm_opts("BN")], 20 + 8 + 1 + 4),
    "Mask R-CNN, FrozenBN": ([RCNN_BASE, *norm_opts("FrozenBN")], 20 + 8 + 1 + 4),
}


def make_batch():
    generator = torch.Generator().manual_seed(1)
    images = list(torch.rand(2, 3, 128, 128, generator=generator, dtype=torch.float64))
    boxes = torch.tensor([[10.0, 20, 60, 70], [40, 10, 100, 120]], dtype=torch.float64)
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    masks[0, 20:70, 10:60] = masks[1, 10:120, 40:100] = 1
    labels = torch.tensor([1, 2])
    return images, [{"boxes": boxes, "labels": labels, "masks": masks} for _ in images]


def check_training(frozen, number):
    frozen.double().train()
    tuned = copy.deepcopy(frozen)
    report = tune(tuned)
    assert report.left == {} and len(report.tuned) == number
    assert list(tuned.state_dict()) == list(frozen.state_dict())
    losses = []
    for model in (tuned, frozen):
        torch.manual_seed(4)  # the sampling of anchors and RoIs
        losses.append(model(*copy.deepcopy(make_batch())))
        sum(losses[-1].values()).backward()
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    for (key, p), q in zip(tuned.named_parameters(), frozen.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-8 * q.grad.abs().max() + 1e-12, key


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients(name, affine):
    opts, number = DETECTORS[name]
    check_training(freeze(make_model(*opts), affine=affine), number)


def test_a_detector_of_torchvision_itself():
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, trainable_backbone_layers=6
    )
    for name, t in model.named_buffers():
        if name.endswith("running_var"):
            t.fill_(0.01)
    freeze(model)
    number = sum(hasattr(m, "running_var") for m in model.modules())
    check_training(model, number)


def num_tuned(model):
    return sum(isinstance(m, TunedNorm) for m in model.modules())


def test_by_a_config_key(tiny_shapes, tmp_path):
    """From the start what is frozen then, and the rest as it is frozen; the same checkpoints."""
    saved = []
    for is_tuned in ("False", "True"):
        cfg = make_cfg(
            "torchvision", BASE, *tiny_shapes, "OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "()",
            *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
            *("SOLVER.FREEZE_BN_ITER", "2", "SOLVER.FREEZE_BN_PRECISE", "False", "SEED", "1"),
            *("MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.TUNE_BN", is_tuned),
        )  # fmt: skip
        trainer = Trainer(cfg)
        trainer.resume_or_load(False)
        numbers, step = [], trainer.run_step

        def counted(batches, step=step, trainer=trainer, numbers=numbers):
            numbers.append(num_tuned(trainer.model))
            return step(batches)

        trainer.run_step = counted
        trainer.train()
        assert numbers == ([5, 5, 30, 30] if is_tuned == "True" else [0] * 4)
        saved.append(torch.load(tmp_path / "model_final.pth", weights_only=True)["model"])
    assert list(saved[0]) == list(saved[1])
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_types_are_those_of_the_convolution():
    """In mixed precision torchvision's own layer returns float32."""
    conv = torch.nn.Conv2d(4, 8, 3)
    net = torch.nn.Sequential(conv, FrozenBatchNorm2d(8))
    tune(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert {net(torch.randn(2, 4, n, n)).dtype for n in (4, 16)} == {torch.bfloat16}
