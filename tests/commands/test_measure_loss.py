"""tools/measure_loss.py on both hosts: the losses are those of training."""

import argparse
import importlib
import json

import pytest
import torch

from bn_det.layers.blocks import evaluated_with
from here import run_here
from hosts import HOSTS
from reference import BASE, RCNN_BASE

PACKAGES = {"torchvision": "tv", "detectron2": "d2"}


@pytest.fixture(params=HOSTS)
def project(request, tiny_shapes, tmp_path):
    """A host's train module, options, and a new model with a checkpoint."""
    train = importlib.import_module(f"bn_det.{PACKAGES[request.param]}.train")
    path = tmp_path / "model.pth"
    opts = [*tiny_shapes, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.WEIGHTS", str(path)]
    torch.save({"model": {}}, path)  # for the check that it is there
    cfg = train.setup(arguments(opts))
    build = train.build_model if request.param == "torchvision" else train.Trainer.build_model
    model = build(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    torch.save({"model": model.state_dict()}, path)
    return request.param, opts, model


def arguments(opts):
    return argparse.Namespace(
        config_file=BASE, opts=opts, images_per_batch=2, eval_only=True, resume=False,
        num_gpus=1, num_machines=1,
    )  # fmt: skip


def losses_by_hand(host, model, batch):
    """In training mode, with frozen layers, and without the running mean of positives."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    with torch.no_grad():
        if host == "torchvision":
            images, targets, _ = zip(*batch, strict=True)
            return float(sum(model(list(images), list(targets)).values())), len(batch)
        events = importlib.import_module("detectron2.utils.events")
        model.loss_normalizer = 0.0
        with events.EventStorage() as storage:
            losses = model(batch)
            positives = storage.latest()["num_pos_anchors"][0] * 2
        # What was divided by a tenth of the positives.
        return float(sum(losses.values())) / 10, positives


@pytest.mark.parametrize("statistics", ["population", "batch"])
def test_losses_are_those_of_training(project, statistics):
    host, opts, model = project
    loss = importlib.import_module(f"bn_det.{PACKAGES[host]}.loss")
    seen = []
    original = loss.measure_loss

    def keep(batches, number, model, loss_of):
        seen.extend(batches)
        return original(seen, number, model, loss_of)

    loss.measure_loss = keep
    try:
        _, results = loss.measure(arguments(opts))
    finally:
        loss.measure_loss = original
    assert [len(batch) for batch in seen] == [2, 2, 2]
    with evaluated_with(model, statistics):
        found = [losses_by_hand(host, model, batch) for batch in seen]
    expected = sum(value * weight for value, weight in found) / sum(w for _, w in found)
    assert results[statistics].value == pytest.approx(expected, rel=1e-5)


def test_command(project, tmp_path):
    host, opts, _ = project
    args = ("--config-file", BASE, "--images-per-batch", "3", *opts)
    done = run_here("tools/measure_loss.py", "--host", host, *args)
    assert done.returncode == 0, done.stderr
    assert "| batch - population |" in done.stdout
    results = json.loads((tmp_path / "loss.json").read_text())
    assert results["batch"]["value"] != results["population"]["value"]


def test_bad_input(project):
    host, opts, _ = project
    for args, words in (
        (["--images-per-batch", "0"], "--images-per-batch: 0 is not accepted; use 1 or more"),
        (["--images-per-batch", "7"], "--images-per-batch: 7 is not accepted; the data has 6"),
        (["--config-file", RCNN_BASE], "MODEL.META_ARCHITECTURE: 'GeneralizedRCNN' is not"),
    ):
        args = ("--host", host, "--config-file", BASE, *args, *opts)
        done = run_here("tools/measure_loss.py", *args)
        assert done.returncode == 1 and words in done.stderr, done.stderr
