"""tools/train_net.py with LazyConfig files."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import ast
import builtins
import json
import re
import sys
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from bn_det.cli import train
from bn_det.commands.cli import run as run_command
from bn_det.d2.lazy_train import load_lazy_config
from bn_det.training import spikes
from here import run_here

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
GN = str(ROOT / "configs" / "ways" / "GN.py")

FILE = """
import sys

sys.path.insert(0, {tests!r})
from detectron2.config import LazyConfig as _LazyConfig
from detectron2.data.datasets import register_coco_instances
from lazy_tool import shrink as _shrink

for _name, _file, _folder in {sets!r}:
    register_coco_instances(_name, {{}}, _file, _folder)

_cfg = _shrink(_LazyConfig.load({config!r}))
model, dataloader, optimizer = _cfg.model, _cfg.dataloader, _cfg.optimizer
lr_multiplier, train = _cfg.lr_multiplier, _cfg.train
# which no other process could be sent
model.backbone.norm = lambda channels: sys.modules["torch"].nn.BatchNorm2d(channels)
train.update(max_iter=4, output_dir={out!r})
train.checkpointer.period = 2
dataloader.train.total_batch_size = 4
"""


@pytest.fixture
def config(tiny_shapes, tmp_path):
    """A file as users write them: it registers its data, and has a norm of its own."""
    sets = ast.literal_eval(tiny_shapes[1])
    sets = [[f"mine_{name}", *rest] for name, *rest in sets]
    text = FILE.format(
        tests=str(Path(__file__).parent),
        sets=sets,
        config=str(ROOT / "configs" / "ways" / "PreciseBN.py"),
        out=str(tmp_path / "out"),
    )
    text += "dataloader.train.dataset.names = 'mine_tiny_train'\n"
    text += "dataloader.test.dataset.names = 'mine_tiny_val'\n"
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def run(config, *args):
    try:
        done = run_here("tools/train_net.py", "--config-file", config, *args)
    finally:
        for split in ("train", "val"):  # which the file registers
            DatasetCatalog.pop(f"mine_tiny_{split}")
            MetadataCatalog.pop(f"mine_tiny_{split}")
    assert done.returncode == 0, done.stderr
    return done


def last_table(output):
    """The lines from the results table on, which ends the output."""
    lines = output.strip().splitlines()
    first = len(lines) - 1 - lines[::-1].index("Evaluation results for bbox:")
    assert all(line.startswith(("|", "Per-category", "-: ")) for line in lines[first + 1 :])
    return lines[first:]


def test_trains_in_two_processes_resumes_and_evaluates(config, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    capfd.readouterr()
    run(config, "--num-gpus", "2", "train.max_iter=2")
    assert "AP50" in last_table(capfd.readouterr().out)[1]
    monkeypatch.setattr(spikes, "FIRST", 0)
    monkeypatch.setattr(spikes, "LEAST", 1)
    resumed = last_table(run(config, "--resume").stdout)
    assert spikes.read_spikes(out)["largest"]["iteration"] == 3  # two losses are known
    final = torch.load(out / "model_final.pth", weights_only=False)
    assert final["iteration"] == 3
    iterations = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [m["iteration"] for m in iterations if "total_loss" in m] == [0, 1, 2, 3]
    assert sum("precise_bn/error" in m for m in iterations) == 2
    weights = f"train.init_checkpoint={out / 'model_final.pth'}"
    assert last_table(run(config, "--eval-only", weights).stdout) == resumed


def fails(monkeypatch, config, *args):
    """The message of a command that ends with an error, run in this process."""
    arguments = ["--config-file", str(config), *args]
    monkeypatch.setattr(sys, "argv", ["bn-det train", *arguments])
    with pytest.raises(SystemExit) as e:
        run_command(lambda: train.main("bn-det train", arguments))
    message = str(e.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "args, words",
    [
        (["train.max_itre=3"], "train.max_itre: there is no 'max_itre'; nearest .*'max_iter'"),
        (["model.head.norm.x.y=3"], "model.head.norm.x.y: there is no 'x'; .*[+]model.head"),
        (["model.head.conv_dims.7=3"], "there is no '7'"),
        (["train.max_iter.x=3"], "train.max_iter.x: there is no 'x'"),
        (["train.max_iter"], "train.max_iter: is not KEY=VALUE"),
        (["SOLVER.MAX_ITER", "3"], "SOLVER.MAX_ITER: is not KEY=VALUE, .*KEY VALUE is for YAML"),
        (["train.max_iter=[3"], "train.max_iter=.3: is not accepted: "),
        (["train.init_checkpoint=none.pth"], "train.init_checkpoint: there is no file none.pth"),
        (["--eval-only", "train.init_checkpoint=''"], "train.init_checkpoint: '' is not accepted"),
        (
            ["--resume", "train.output_dir=nowhere"],
            "--resume: train.output_dir nowhere has nothing",
        ),
        (["train.device=gpu"], "train.device: 'gpu' is not accepted"),
        (["dataloader.train.dataset.names=coco"], "dataset.names: 'coco' is not a registered"),
        (["--num-gpus", "3"], "total_batch_size: 16 is not accepted with 3 processes"),
        (["train.init_checkpoint=''"], "dataloader.train: .'coco_2017_train'. cannot be loaded"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_options(monkeypatch, tmp_path, args, words):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    out = [] if any("output_dir" in a for a in args) else [f"train.output_dir={tmp_path}"]
    message = fails(monkeypatch, GN, *args, *out)
    assert re.search(words, message), message


def test_bad_files(monkeypatch, tmp_path):
    assert "there is no file nowhere.py" in fails(monkeypatch, "nowhere.py")
    path, builtin_import = tmp_path / "bad.py", builtins.__import__
    for text, words in [
        ("model = (", "bad.py cannot be loaded: SyntaxError: "),
        ("from .nowhere import model", "cannot be loaded: ImportError: "),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("model = dict()", "bad.py has no 'dataloader'; it needs ['model', "),
    ]:
        path.write_text(text)
        assert words in fails(monkeypatch, path)
        assert builtins.__import__ is builtin_import


def test_overrides_of_either_kind(monkeypatch):
    yaml = GN.replace(".py", ".yaml")
    assert "train.max_iter=3: KEY=VALUE is for LazyConfig" in fails(
        monkeypatch, yaml, "train.max_iter=3"
    )
    message = fails(monkeypatch, GN, "--host", "torchvision")
    assert "LazyConfig files are for bn-det train on Detectron2; use the .yaml" in message


def test_what_can_be_overridden():
    cfg = load_lazy_config(
        GN,
        [
            "optimizer.lr=0.5",
            "model.head.conv_dims.0=8",
            "dataloader.train.mapper.augmentations.0.max_size=9",
            "+model.box_reg_loss_type=giou",
            "optimizer.hooks=[precise_bn,average]",
        ],
    )
    assert (cfg.optimizer.lr, cfg.model.head.conv_dims[0]) == (0.5, 8)
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 9
    assert cfg.model.box_reg_loss_type == "giou"
    assert list(cfg.optimizer.hooks) == ["precise_bn", "average"]
