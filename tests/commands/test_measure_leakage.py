"""The leakage measure on both hosts: RoIs as in training, and the command."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from here import run_here
from hosts import HOSTS
from reference import BASE, RCNN_BASE

ROOT = Path(__file__).parents[2]


def arguments(opts):
    """As tools/measure_leakage.py parses them."""
    return argparse.Namespace(
        config_file=RCNN_BASE, opts=opts, images_per_batch=2, eval_only=True, resume=False,
        num_gpus=1, num_machines=1,
    )  # fmt: skip


@pytest.fixture(params=HOSTS)
def checkpoint(request, tiny_shapes, tmp_path):
    """A host, and options that name a new model's checkpoint."""
    opts = [*tiny_shapes, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    package = {"torchvision": "tv", "detectron2": "d2"}[request.param]
    train = importlib.import_module(f"bn_det.{package}.train")
    path = str(tmp_path / "model.pth")
    opts += ["MODEL.WEIGHTS", path]
    torch.save({"model": {}}, path)  # for the check that it is there
    cfg = train.setup(arguments(opts))
    build_model = train.build_model if package == "tv" else train.Trainer.build_model
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    torch.save({"model": model.state_dict()}, path)
    return package, opts, model


def test_rois_are_those_of_training(checkpoint):
    package, opts, model = checkpoint
    leakage = importlib.import_module(f"bn_det.{package}.leakage")
    seen = []

    def keep(_, args):
        seen.append(args[0])

    cfg = leakage.setup(arguments(opts))
    if package == "tv":
        (dataset,) = leakage.load_annotated(cfg)
        # With masks, which training mode samples, too.
        loader = importlib.import_module("bn_det.tv.data").build_test_loader(cfg, dataset, 2)
        model.roi_heads.mask_head = None
    else:
        loader = leakage.annotated_loader(cfg, leakage.load_test_images(cfg), 2)
    inputs = list(loader)
    assert len(inputs) == 3, "6 images"
    torch.manual_seed(5)
    model.eval()
    batches = list(leakage._sampled_rois(model, inputs))
    assert not any(m.training for m in model.modules()), "as it was"
    model.train()
    model.roi_heads.box_head.register_forward_pre_hook(keep)
    torch.manual_seed(5)
    for batch in inputs:
        if package == "tv":
            images, targets, _ = zip(*batch, strict=True)
            model(list(images), list(targets))
        else:
            events = importlib.import_module("detectron2.utils.events")
            with events.EventStorage():
                model(batch)
    assert len(seen) == len(batches)
    for x, batch in zip(seen, batches, strict=True):
        assert torch.equal(x, batch.features)
        assert (batch.labels == batch.background).any() and batch.labels.min() >= 0


def run(host, tool, *args):
    """A command on a host: on torchvision started, on Detectron2 in this process."""
    args = ("--host", host, *args)
    if host == "detectron2":
        return run_here(tool, *args)
    command = [sys.executable, str(ROOT / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command(checkpoint, tmp_path):
    package, opts, _ = checkpoint
    host = {"tv": "torchvision", "d2": "detectron2"}[package]
    args = ("--config-file", RCNN_BASE, "--images-per-batch", "2", *opts)
    done = run(host, "tools/measure_leakage.py", *args)
    assert done.returncode == 0, done.stderr
    assert "| batch - population |" in done.stdout and "foreground accuracy" in done.stdout
    results = json.loads((tmp_path / "leakage.json").read_text())
    assert results["batch"]["loss"]["value"] != results["population"]["loss"]["value"]


def test_evaluation_with_either_statistics(checkpoint, tmp_path):
    """One checkpoint, evaluated both ways."""
    package, opts, _ = checkpoint
    host = {"tv": "torchvision", "d2": "detectron2"}[package]
    found = []
    for statistics in ("population", "batch"):
        done = run_here(
            "tools/train_net.py",
            *("--host", host, "--config-file", RCNN_BASE, "--eval-only", *opts),
            *("TEST.BN_STATISTICS", statistics, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
            *("TEST.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD']"),
        )
        assert done.returncode == 0, done.stderr
        path = tmp_path / "inference" / "coco_instances_results.json"
        found.append([d["score"] for d in json.loads(path.read_text())])
    assert found[0] and found[1] and found[0] != found[1]


def test_bad_input(tmp_path):
    for args, words in (
        (
            ["--config-file", RCNN_BASE, "--images-per-batch", "0"],
            "--images-per-batch: 0 is not accepted; use 1 or more",
        ),
        (["--config-file", RCNN_BASE], "MODEL.WEIGHTS: '' is not accepted"),
        (
            ["--config-file", BASE, "MODEL.WEIGHTS", __file__, "DATASETS.TEST", "()"],
            "MODEL.META_ARCHITECTURE: 'BNRetinaNet' is not accepted",
        ),
    ):
        done = run_here("tools/measure_leakage.py", "--host", "torchvision", *args)
        assert done.returncode == 1 and words in done.stderr, done.stderr
