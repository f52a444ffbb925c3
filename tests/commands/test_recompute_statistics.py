"""tools/recompute_statistics.py on both hosts."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bn_det import DomainBatchNorm2d
from bn_det.cli import recompute
from bn_det.config.load import load_config
from bn_det.errors import InputError
from here import run_here
from hosts import HOSTS, every_host
from reference import BASE, RCNN_BASE

ROOT = Path(__file__).parents[2]
PACKAGES = {"torchvision": "tv", "detectron2": "d2"}


class Project:
    """A host, options for a small data set, and a checkpoint with statistics that are wrong."""

    def __init__(self, host, opts, folder):
        self.host, self.folder = host, folder
        self.module = importlib.import_module(f"bn_det.{PACKAGES[host]}.recompute")
        small = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(folder)]
        self.opts = [*opts, *small]
        self.weights = folder / "old.pth"

    def cfg(self, *opts, config=BASE):
        train = importlib.import_module(f"bn_det.{PACKAGES[self.host]}.train")
        cfg = train.get_cfg()
        if self.host == "detectron2":
            train.add_bn_det_config(cfg)
        load_config(cfg, config, [*self.opts, *opts], self.host)
        return cfg

    def build(self, *opts, config=BASE):
        cfg = self.cfg(*opts, config=config)
        if self.host == "torchvision":
            return self.module.build_model(cfg)
        return self.module.Trainer.build_model(cfg)

    def checkpoint(self, *opts, config=BASE):
        torch.manual_seed(3)
        model = self.build(*opts, config=config)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
        torch.save({"model": model.state_dict()}, self.weights)
        return model

    def run(self, *args, opts=(), config=BASE):
        command = ["--config-file", config, "--weights", str(self.weights), *args]
        parser = recompute.argument_parser("bn-det recompute")
        parsed = parser.parse_intermixed_args([*command, *self.opts, *opts])
        self.module.main(parsed)


@pytest.fixture(params=HOSTS)
def project(request, tiny_shapes, tmp_path):
    return Project(request.param, tiny_shapes, tmp_path)


def load(path):
    return torch.load(path, weights_only=True)["model"]


def statistics_of(state):
    return {k: v for k, v in state.items() if "running" in k}


def test_training_images(project, capsys):
    project.checkpoint()
    before = project.weights.read_bytes()
    output = project.folder / "made" / "new.pth"
    larger = ["TEST.PRECISE_BN.IMS_PER_BATCH", "3"]
    detections = project.folder / "inference" / "coco_instances_results.json"
    detections.parent.mkdir()
    detections.write_text("[]")
    project.run("--output", str(output), "--num-iters", "6", "--evaluate", opts=larger)
    assert project.weights.read_bytes() == before
    assert detections.read_text() == "[]", "they are of the run's own model"
    assert os.listdir(detections.parent) == [detections.name]
    old, new = load(project.weights), load(output)
    assert old.keys() == new.keys()
    for name, value in new.items():
        assert torch.equal(value, old[name]) != ("running" in name), name
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["num_samples"] == 18 and report["reason"] == "num_iters"
    assert max(of["mean_shift"] for of in report["layers"]) > 0.5
    shown = capsys.readouterr().out
    assert "error of variance" in shown
    assert "With the statistics before" in shown and "With the statistics after" in shown


def test_looking_alone(project, capsys):
    """Without --output nothing is written; which layer is furthest off, in units."""
    model = project.checkpoint()
    name = FIRST_NORM[BASE][project.host]
    model.get_submodule(name).running_var.mul_(1e4)
    torch.save({"model": model.state_dict()}, project.weights)
    before = {path: path.read_bytes() for path in project.folder.iterdir() if path.is_file()}
    project.run("--num-iters", "2")
    shown = capsys.readouterr().out
    assert f"Furthest from the new ones: {name} (mean by " in shown and "variance by " in shown
    after = {path: path.read_bytes() for path in project.folder.iterdir() if path.is_file()}
    assert {p: after[p] for p in before} == before
    assert not [p for p in after if p.suffix in (".pth", ".json") and p not in before]


def test_folded_statistics_are_refused(project):
    """Unless the command says that they were never updated."""
    model = project.checkpoint()
    for layer in model.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.reset_running_stats()
            if layer.weight is not None:
                torch.nn.init.uniform_(layer.weight)
    torch.save({"model": model.state_dict()}, project.weights)
    with pytest.raises(InputError, match="its statistics are folded .*initial=True"):
        project.run("--num-iters", "2")
    project.run("--num-iters", "2", "--initial")


def test_per_level(project, capsys):
    """A checkpoint with shared statistics, per level: the scheme that will use them."""
    shared = ["MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "shared"]
    project.checkpoint(*shared)
    output = project.folder / "new.pth"
    args = ["--output", str(output), "--num-iters", "3", "--population", "per_domain"]
    project.run(*args, opts=shared)
    assert "MODEL.RETINANET.BN.POPULATION per_domain from now on" in capsys.readouterr().out
    model = project.build(*shared, "MODEL.RETINANET.BN.POPULATION", "per_domain")
    model.load_state_dict(load(output))
    layers = [m for m in model.modules() if isinstance(m, DomainBatchNorm2d)]
    assert layers
    for layer in layers:
        means = torch.stack([layer.population_of(k).running_mean for k in range(5)])
        assert (means.std(0) > 0).all(), "each level has its own"
    project.weights = output
    back = project.folder / "back.pth"
    project.run("--output", str(back), "--num-iters", "3", "--population", "shared",
                opts=[*shared[:2], "MODEL.RETINANET.BN.POPULATION", "per_domain"])  # fmt: skip
    project.build(*shared).load_state_dict(load(back))


FIRST_NORM = {
    BASE: {"torchvision": "backbone.body.bn1", "detectron2": "backbone.bottom_up.stem.conv1.norm"},
    # The backbone of that config is frozen.
    RCNN_BASE: dict.fromkeys(PACKAGES, "roi_heads.box_head.conv1.norm"),
}


@pytest.mark.parametrize("config", [BASE, RCNN_BASE], ids=["retinanet", "rcnn"])
def test_adabn(project, config):
    """The images of the test set, once, in test mode, and no annotation is looked at."""
    model = project.checkpoint(config=config)
    unlabelled = project.folder / "unlabelled.json"
    sets = project.opts[project.opts.index("DATASETS.REGISTER_COCO") + 1]
    _, (_, file, images) = ast.literal_eval(sets)
    content = json.loads(Path(file).read_text())
    unlabelled.write_text(json.dumps({**content, "annotations": []}))
    sets = repr([["unlabelled", str(unlabelled), images]])
    output = project.folder / "new.pth"
    args = ["--adabn", "--dataset", "unlabelled", "--output", str(output)]
    more = ["DATASETS.REGISTER_COCO", sets, "DATASETS.TRAIN", "()"]
    more += ["DATASETS.TEST", "('unlabelled',)"]
    project.run(*args, opts=more, config=config)
    new = load(output)
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["reason"] == "end of data" and report["num_batches"] == 3
    # What the first norm sees depends on no other one.
    name = FIRST_NORM[config][project.host]
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model.eval()
    cfg = project.cfg(*more, config=config)
    if project.host == "detectron2":
        importlib.import_module("bn_det.d2").register_datasets(cfg)
    with torch.no_grad():
        for batch in project.module._test_batches(cfg):
            project.module._detect(model, batch) if project.host == "torchvision" else model(batch)
    x = torch.cat(seen).movedim(1, -1).flatten(0, -2).double()
    assert len(seen) == 3
    close = {"rtol": 1e-6, "atol": 1e-6}  # float32
    torch.testing.assert_close(new[f"{name}.running_mean"].double(), x.mean(0), **close)
    torch.testing.assert_close(new[f"{name}.running_var"].double(), x.var(0, correction=0), **close)


@pytest.mark.slow
def test_several_processes(project):
    """All of the data, and the same file as from one process but for what rounding makes."""
    # A level of one value in an image can be normalized together with others only.
    shared = ["MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "shared"]
    project.checkpoint(*shared)
    args = ["--adabn", "--num-iters", "9", "--output"]
    project.run(*args, str(project.folder / "1.pth"), opts=shared)
    command = [
        *(sys.executable, str(ROOT / "tools" / "recompute_statistics.py")),
        *("--config-file", BASE, "--host", project.host, "--weights", str(project.weights)),
        *(*args, str(project.folder / "2.pth"), "--num-gpus", "2", *project.opts, *shared),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # What it is run with is in the folder's log alone.
    assert "| layer " in done.stdout and "BASE_LR" not in done.stdout
    assert "BASE_LR" in (project.folder / "log.txt").read_text()
    one, two = (statistics_of(load(project.folder / f"{num}.pth")) for num in "12")
    # Later layers see batches of other images together.
    first = FIRST_NORM[BASE][project.host]
    for name in (f"{first}.running_mean", f"{first}.running_var"):
        torch.testing.assert_close(one[name], two[name])
    report = json.loads((project.folder / "2.json").read_text())
    assert report["num_samples"] == 6


def test_bad_input(project):
    project.checkpoint()
    weights = str(project.weights)
    before = project.weights.read_bytes()
    output = ["--output", str(project.folder / "new.pth")]
    for args, opts, words in (
        (["--output", weights], [], "use another file than --weights"),
        ([*output, "--num-iters", "0"], [], "--num-iters: 0 is not accepted"),
        (output, ["TEST.PRECISE_BN.IMS_PER_BATCH", "-4"], "IMS_PER_BATCH: -4 is not accepted"),
        ([*output, "--num-gpus", "2"], ["TEST.PRECISE_BN.IMS_PER_BATCH", "3"], "multiple of 2"),
        ([*output, "--tolerance", "-1"], [], "--tolerance: -1.0 is not accepted"),
        ([*output, "--dataset", "shapes_vla"], [], "'shapes_vla' is not a registered data set"),
        (output, ["MODEL.RETINANET.NUM_CONVS", "3"], "checkpoint lacks it"),
    ):
        with pytest.raises(InputError, match=words):
            project.run(*args, opts=opts)
    assert not (project.folder / "new.pth").exists()
    assert project.weights.read_bytes() == before
    project.checkpoint(*(NO_NORM := [o for p in PARTS for o in (f"MODEL.{p}.NORM", "")]))
    with pytest.raises(InputError, match="no BatchNorm with population statistics"):
        project.run(*output, opts=NO_NORM)
    project.weights = project.folder / "missing.pth"
    with pytest.raises(InputError, match="there is no file"):
        project.run(*output)
    with pytest.raises(InputError, match="--population: 'shared' is not accepted: .*no head"):
        project.weights = Path(weights)
        project.run(*output, "--population", "shared", config=RCNN_BASE)


PARTS = ("RESNETS", "FPN", "RETINANET")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--weights", "none.pth"], "--weights: there is no file none.pth"),
        (["--weights", "12"], "--weights: there is no file 12"),
        (["--weights", ""], "--weights: '' is not accepted; name a checkpoint"),
        (["--dataset", "shapes_vla"], "--dataset: 'shapes_vla' is not a registered data set"),
        (["--dataset", "a'b", "--adabn"], '--dataset: "a\'b" is not a registered data set'),
        (["--num-iters", "0"], "--num-iters: 0 is not accepted; use 1 or more"),
        (["--tolerance", "-1"], "--tolerance: -1.0 is not accepted; use 0.0 (for none) or more"),
        (["--tolerance", "nan"], "--tolerance: nan is not accepted; use 0.0 (for none) or more"),
        (["--tolerance", "inf"], "--tolerance: inf is not accepted; use 0.0 (for none) or more"),
        (["TEST.PRECISE_BN.NUM_ITER", "0"], "TEST.PRECISE_BN.NUM_ITER: 0 is not accepted"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN: () is not accepted; name a data set"),
        (["--adabn", "DATASETS.TEST", "()"], "DATASETS.TEST: () is not accepted; name a data set"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
@every_host
def test_errors_name_what_was_typed(host, tiny_shapes, tmp_path, flags, words):
    """The flag, where it was a flag that gave the value, and not the key that it stands for."""
    weights = tmp_path / "old.pth"
    torch.save({"model": {}}, weights)
    command = ("--host", host, "--config-file", BASE, "--weights", weights, *tiny_shapes)
    opts = ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path)
    done = run_here("tools/recompute_statistics.py", *command, *opts, *flags)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {words}")
