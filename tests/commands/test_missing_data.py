"""Data sets that are not there, for every command: one line, and no traceback."""

import ast
import json
from pathlib import Path

import pytest
import torch

from export import make_model
from here import run_here
from hosts import detectron2, every_host
from reference import BASE, RCNN_BASE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    """With data sets of which the images, the annotation file, objects or all images are gone."""
    sets = ast.literal_eval(tiny_shapes[1])
    (_, file, images), _ = sets
    content = json.loads(Path(file).read_text())
    for name, change in (("objects", {"annotations": []}), ("all", {"images": []})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**content, "annotations": [], **change}))
        sets.append([name, str(path), images])
    sets += [["images", file, "/nowhere"], ["file", "/nowhere/a.json", images]]
    return [
        *("DATASETS.REGISTER_COCO", repr(sets), *tiny_shapes[2:], "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1"),
    ]


TRAIN = ("recompute_statistics", "average_checkpoints", "train_net")
TEST = (
    *("recompute_statistics --adabn", "average_checkpoints", "measure_loss", "measure_leakage"),
    "train_net --eval-only",
)


def run(host, command, weights, opts):
    tool, *flags = command.split()
    config = RCNN_BASE if tool == "measure_leakage" else BASE
    if tool == "recompute_statistics":
        flags += ["--weights", weights]
    elif tool == "average_checkpoints":
        flags += ["--inputs", weights, weights, "--output", weights.with_name("average.pth")]
    else:
        opts = [*opts, "MODEL.WEIGHTS", weights]
    args = ("--host", host, "--config-file", config, *flags, *opts)
    return run_here(f"tools/{tool}.py", *args)


def error_of(done):
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.fixture
def weights(host, tmp_path):
    """Of either config."""
    paths = {}
    for config in (BASE, RCNN_BASE):
        paths[config] = tmp_path / f"{Path(config).stem}.pth"
        torch.save({"model": make_model(host, config).state_dict()}, paths[config])
    return paths


@every_host
def test_training_images(host, weights, opts):
    for command in TRAIN:
        for name, words in [
            ("images", "/nowhere/000"),
            ("file", "there is no annotation file /nowhere/a.json"),
            ("objects", "DATASETS.TRAIN: ('objects',) "),
            ("all", "all"),
        ]:
            more = ["DATASETS.TRAIN", f"('{name}',)"]
            error = error_of(run(host, command, weights[BASE], [*opts, *more]))
            assert error.startswith("error: ") and words in error, (command, name)


@every_host
def test_test_images(host, weights, opts):
    for command in TEST:
        for name, words in [
            ("images", "/nowhere/000"),
            ("file", "there is no annotation file /nowhere/a.json"),
            ("objects", "DATASETS.TEST: ('objects',) "),
            ("", "DATASETS.TEST: () "),
        ]:
            if words[0] != "D" or command in TEST[1:4]:  # what is measured has objects
                of = weights[RCNN_BASE if command == "measure_leakage" else BASE]
                more = ["DATASETS.TEST", f"('{name}',)" if name else "()"]
                error = error_of(run(host, command, of, [*opts, *more]))
                assert error.startswith("error: ") and words in error, (command, name)


@every_host
def test_a_set_of_detectron2_by_a_flag(host, weights, opts, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    more = ["--dataset", "coco_2017_train"]
    error = error_of(run(host, "recompute_statistics", weights[BASE], [*more, *opts]))
    assert error.startswith("error: ") and "instances_train2017.json" in error


@pytest.mark.slow
@every_host
def test_in_several_processes(host, weights, opts, capfd):
    more = ["--num-gpus", "2", "DATASETS.TRAIN", "('images',)"]
    error = error_of(run(host, "recompute_statistics", weights[BASE], [*opts, *more]))
    assert error.startswith("error: ") and "/nowhere/000" in error
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("host", [detectron2])
@pytest.mark.parametrize("workers", [0, 1])
def test_lazy_config(host, workers, opts, tmp_path):
    from bn_det.d2.datasets import _register
    from bn_det.data.coco import CocoSource

    (_, file, _), *_ = ast.literal_eval(opts[1])
    _register({"lazy_images": CocoSource(file, "/nowhere")})
    overrides = ("train.device=cpu", f"train.output_dir={tmp_path}", "train.init_checkpoint=''",
                 "dataloader.train.dataset.names=lazy_images", "model.num_classes=4",
                 "dataloader.train.total_batch_size=1",
                 f"dataloader.train.num_workers={workers}")  # fmt: skip
    config = ROOT / "configs" / "ways" / "GN.py"
    done = run_here("tools/train_net.py", "--host", host, "--config-file", config, *overrides)
    error = error_of(done)
    assert "No such file or directory" in error and "/nowhere/000" in error
