"""Our hook and layers where a training is written down in Python, as LazyConfig files are."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import (
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.engine import SimpleTrainer, default_writers, hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from bn_det import DomainBatchNorm2d, update_bn_stats
from bn_det.config.load import load_config
from bn_det.d2 import BNRetinaNetHead, PreciseBN, add_bn_det_config, register_datasets
from reference import BASE

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_ITER = 5
LEVELS = partial(DomainBatchNorm2d, num_domains=5, statistics="shared", population="shared")


def stock_detector(head):
    """The small RetinaNet of the tests, without its head's norm, and with another head."""
    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NORM", ""], "Detectron2")
    model = build_model(cfg)
    model.head = head
    return model


def make_config(folder):
    return OmegaConf.create(
        {
            "model": L(stock_detector)(
                head=L(BNRetinaNetHead)(
                    input_shape=[ShapeSpec(channels=64)] * 5,
                    num_classes=4,
                    num_anchors=2,
                    conv_dims=[64],
                    norm=LEVELS,
                )
            ),
            "optimizer": L(torch.optim.SGD)(
                params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.01
            ),
            "lr_multiplier": L(WarmupParamScheduler)(
                scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[3, MAX_ITER]),
                warmup_factor=0.1,
                warmup_length=0.5,
            ),
            "train_loader": L(build_detection_train_loader)(
                dataset=L(get_detection_dataset_dicts)(names="tiny_train"),
                mapper=L(DatasetMapper)(
                    is_train=True,
                    augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64)],
                    image_format="BGR",
                ),
                total_batch_size=2,
                num_workers=0,
            ),
            "output_dir": str(folder),
        },
        flags={"allow_objects": True},
    )


def test_a_training_in_the_manner_of_lazyconfig_train_net(tiny_shapes, tmp_path):
    cfg = get_cfg()
    add_bn_det_config(cfg)
    cfg.merge_from_list(tiny_shapes)
    register_datasets(cfg)
    lazy = make_config(tmp_path)
    model = instantiate(lazy.model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    trainer = SimpleTrainer(model, instantiate(lazy.train_loader), optimizer)
    checkpointer = DetectionCheckpointer(model, lazy.output_dir, trainer=trainer)
    loader = instantiate(lazy.train_loader)
    batches = [batch for _, batch in zip(range(9), loader, strict=False)]
    precise = PreciseBN([2], model, copy.deepcopy(batches), num_iter=9)
    evaluated = []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(lazy.lr_multiplier)),
            precise,
            hooks.PeriodicCheckpointer(checkpointer, period=2),
            hooks.EvalHook(2, lambda: evaluated.append(copy.deepcopy(model.state_dict()))),
            hooks.PeriodicWriter(default_writers(lazy.output_dir, MAX_ITER), period=1),
        ]
    )
    trainer.train(0, MAX_ITER)
    names = ("model_0000001", "model_0000003", "model_final")
    for state, name in zip(evaluated, names, strict=True):
        saved = torch.load(tmp_path / f"{name}.pth", weights_only=False)["model"]
        assert all(torch.equal(value, saved[key]) for key, value in state.items())
    assert (tmp_path / "metrics.json").read_text().count("precise_bn/error") == 3
    # The statistics of the end are those of the final weights.
    again = copy.deepcopy(model).train()
    update_bn_stats(again, batches, 9)
    state = again.state_dict()
    assert sum("running_var" in key for key in state) > 20
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_head_in_a_file_of_python(tmp_path):
    """LazyConfig's own loading, of a file as users write them."""
    path = tmp_path / "head.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.layers import ShapeSpec\n"
        "from bn_det import DomainBatchNorm2d\n"
        "from bn_det.d2 import BNRetinaNetHead\n"
        "head = L(BNRetinaNetHead)(\n"
        "    input_shape=[ShapeSpec(channels=8)] * 2, num_classes=3, num_anchors=1,\n"
        "    conv_dims=[8], norm=lambda channels: DomainBatchNorm2d(channels, 2),\n"
        ")\n"
    )
    head = instantiate(LazyConfig.load(str(path)).head)
    logits, _ = head([torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)])
    assert [tuple(x.shape) for x in logits] == [(2, 3, 4, 4), (2, 3, 2, 2)]
    assert isinstance(head.cls_subnet[1], DomainBatchNorm2d)
