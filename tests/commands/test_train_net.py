"""tools/train_net.py on both hosts: the main job, and what bad input gets."""

import ast
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bn_det.cli import train
from bn_det.commands.cli import run as run_command
from here import run_here
from hosts import INSTALLED, every_host
from reference import BASE
from waiting import takes_ctrl_c, wait_for

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"


@pytest.fixture
def options(tiny_shapes, tmp_path):
    """A run of a few seconds."""
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")),
        *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *tiny_shapes,
    ]


def command(host, *args):
    return [sys.executable, str(TRAIN_NET), "--host", host, "--config-file", BASE, *args]


def run(host, *args, timeout=300):
    return subprocess.run(command(host, *args), capture_output=True, text=True, timeout=timeout)


def succeeds(host, *args):
    """The command, in this process."""
    done = run_here("tools/train_net.py", "--host", host, "--config-file", BASE, *args)
    assert done.returncode == 0, done.stderr
    return done


def last_table(done):
    """The lines from the results table on, which ends the output."""
    lines = done.stdout.strip().splitlines()
    first = len(lines) - 1 - lines[::-1].index("Evaluation results for bbox:")
    assert all(line.startswith(("|", "Per-category", "-: ")) for line in lines[first + 1 :])
    return lines[first:]


def fails(monkeypatch, host, *args, config=BASE):
    """The message of a command that ends with an error, run in this process."""
    arguments = ["--host", host, "--config-file", config, *map(str, args)]
    monkeypatch.setattr(sys, "argv", ["bn-det train", *arguments])
    handlers = logging.root.handlers[:]
    with pytest.raises(SystemExit) as e:
        run_command(lambda: train.main("bn-det train", arguments))
    # The command's log goes to a standard output that ends with the test.
    logging.root.handlers[:] = handlers
    message = str(e.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


@every_host
def test_trains_and_evaluates(host, options, tmp_path):
    out = tmp_path / "out"
    trained = succeeds(host, *options, "SOLVER.MAX_ITER", "2")
    assert f"Host: {host} (--host {host})" in trained.stdout
    # The results table comes last.
    tail = last_table(trained)
    assert "AP50" in tail[1]
    # Detectron2 has no categories if all is NaN, which a last line speaks of.
    assert len([line for line in tail if not line.startswith("-: ")]) in (4, 8)
    metrics = (out / "metrics.json").read_text().splitlines()
    assert any("bbox/AP" in json.loads(line) for line in metrics)
    assert list(out.glob("events.out.tfevents.*")) and (out / "config.yaml").exists()
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    assert last_table(succeeds(host, "--eval-only", *options, *weights)) == tail
    # As after a kill during the last evaluation: all that is left to do is done.
    assert last_table(succeeds(host, "--resume", *options, "SOLVER.MAX_ITER", "2")) == tail


@every_host
def test_an_integer_for_a_float(host, options, tmp_path):
    """At the end of the command and in a file, as a number of it and as a text."""
    path = tmp_path / "a.yaml"
    path.write_text(f'_BASE_: "{BASE}"\nSOLVER: {{BASE_LR: 1, GAMMA: "1"}}\n')
    more = ("SOLVER.SYNC_BN_TIMEOUT", "60", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    succeeds(host, "--config-file", path, *options, *more)
    lines = (tmp_path / "out" / "config.yaml").read_text().split("\n  ")
    for line in ("SYNC_BN_TIMEOUT: 60.0", "BASE_LR: 1.0", "GAMMA: 1.0"):
        assert line in lines


@pytest.mark.slow
@every_host
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_continues_after_a_kill(host, how, options, tmp_path):
    out = tmp_path / "out"
    options += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    long = [*options, "SOLVER.MAX_ITER", "1000000", "SOLVER.CHECKPOINT_PERIOD", "3"]
    process = subprocess.Popen(
        command(host, *long),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=takes_ctrl_c,
    )
    try:
        wait_for((out / "model_0000005.pth").exists, 240)
        process.send_signal(how)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait(60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and error.splitlines()[-1] == "interrupted"
        assert "Traceback" not in error
    last = (out / "last_checkpoint").read_text()
    done = torch.load(out / last, weights_only=True)["iteration"] + 1
    assert done >= 3

    last_table(succeeds(host, "--resume", *options, "SOLVER.MAX_ITER", str(done + 2)))
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["iteration"] == done + 1


@every_host
def test_what_cannot_be_resumed(host, options, tmp_path, monkeypatch):
    """Each gets its line; the folder is as it was."""
    out = tmp_path / "out"
    options += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATASETS.TEST", "()"]
    short = [*options, "SOLVER.MAX_ITER", "2"]
    succeeds(host, *short)
    before = (out / "config.yaml").read_bytes()
    evaluated = ("MODEL.WEIGHTS", out / "model_final.pth", "SOLVER.BASE_LR", "0.5")
    succeeds(host, "--eval-only", *options, *evaluated)
    assert (out / "config.yaml").read_bytes() == before
    for key, value in (("BASE_LR", "0.5"), ("WEIGHT_DECAY", "0.25"), ("MOMENTUM", "0")):
        words = f"SOLVER.{key}: {float(value)} is not accepted with --resume: .* goes on with "
        assert re.search(
            words, fails(monkeypatch, host, "--resume", *options, f"SOLVER.{key}", value)
        )
    assert (out / "config.yaml").read_bytes() == before
    content = torch.load(out / "model_final.pth", weights_only=True)
    torch.save({"model": content["model"]}, out / "model_final.pth")
    assert "weights alone" in fails(monkeypatch, host, "--resume", *options)


@every_host
def test_a_run_that_only_lacks_its_last_file(host, options, tmp_path):
    """It was killed between the checkpoint of its last iteration and model_final.pth."""
    out = tmp_path / "out"
    options += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2"]
    succeeds(host, *options)
    before = torch.load(out / "model_final.pth", weights_only=True)
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000001.pth")
    (out / "config.yaml").write_text("")  # another run was killed as it wrote it
    succeeds(host, "--resume", *options)
    after = torch.load(out / "model_final.pth", weights_only=True)
    assert after.keys() == before.keys() and after["iteration"] == before["iteration"] == 1
    assert all(v.equal(after["model"][k]) for k, v in before["model"].items())
    assert (out / "last_checkpoint").read_text() == "model_final.pth"


@every_host
def test_a_run_without_a_checkpoint_begins_anew(host, options, tmp_path):
    """It was killed before its first one."""
    options += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    succeeds(host, *options)
    for path in (tmp_path / "out").glob("*"):
        if path.name != "config.yaml" and path.is_file():
            path.unlink()
    done = succeeds(host, "--resume", *options)
    assert "has no checkpoint yet; the training begins anew" in done.stdout
    assert torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["iteration"] == 0


def test_auto_says_what_it_took_and_why(options, tmp_path):
    done = run("auto", *options, "MODEL.WEIGHTS", tmp_path / "none.pth")
    host, words = ("detectron2", "") if INSTALLED else ("torchvision", "not ")
    assert done.stdout.startswith(f"Host: {host} (--host auto, and Detectron2 is {words}installed)")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: MODEL.WEIGHTS: there is no file")
    assert "Traceback" not in done.stderr


@every_host
@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["MODEL.RETINANET.NORM", "SyncBatchNorm2d"],
            ["RETINANET.NORM: 'SyncBatchNorm2d'", "'BN'"],
        ),
        (["MODEL.RESNETS.NORM", "bn"], ["MODEL.RESNETS.NORM: 'bn'", "'FrozenBN'"]),
        (["MODEL.FPN.NORM", "bn"], ["MODEL.FPN.NORM: 'bn'", "'FrozenBN'"]),
        (
            ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "48"],
            ["MODEL.FPN.NORM: 'GN'", "48 channels; use a multiple of 32"],
        ),
        (["MODEL.RETINANET.BN.AFFINE", "own"], ["BN.AFFINE: 'own'", "'shared', 'per_domain'"]),
        (["MODEL.RETINANET.BM", "1"], ["MODEL.RETINANET.BM", "Non-existent", "host"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER: 'many'", "use an integer, 1 to 10000"]),
        (["DATASETS.TRAIN", "name"], ["DATASETS.TRAIN: 'name'", "a list of names, such as ['"]),
        (["MODEL.RETINANET.NUM_CONVS", "1.5"], ["NUM_CONVS: '1.5'", "an integer, 0 to 1000"]),
        (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "no value"]),
        (["train.max_iter=3"], ["train.max_iter=3: KEY=VALUE is for LazyConfig files"]),
        (["DATASETS.TRAIN", "('shape_train',)"], ["DATASETS.TRAIN: 'shape_train'", "shapes_train"]),
        (["DATASETS.TEST", "('coco_2017_vla',)"], ["DATASETS.TEST", "coco_2017_val"]),
        (["DATASETS.REGISTER_COCO", "[['a', 'b']]"], ["REGISTER_COCO: ['a', 'b']", "JSON file"]),
        (["--resume"], ["--resume", "nothing to resume"]),
        (["--eval-only"], ["MODEL.WEIGHTS: ''", "name a checkpoint"]),
        (["MODEL.WEIGHTS", "none.pth"], ["MODEL.WEIGHTS", "no file none.pth"]),
        (["MODEL.RETINANET.NUM_CLASSES", "3"], ["NUM_CLASSES: 3", "4 categories"]),
        (["--num-gpus", "64"], ["SOLVER.IMS_PER_BATCH: 2", "64 processes", "multiple of 64"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE: 'gpu'"]),
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN: ()"]),
        (["MODEL.RETINANET.NUM_CONVS.X", "3"], ["NUM_CONVS.X: '3'"]),
        (
            ["SOLVER.IMS_PER_BATCH", "1"],
            [": domain 4: ", "single value per channel", "head.cl", "(SOLVER.IMS_PER_BATCH)"],
        ),
        (
            ["TEST.BN_STATISTICS", "batch"],
            [
                "TEST.BN_STATISTICS: 'batch' is not accepted with ",
                ".png: head.cl",
                "BN_STATISTICS_P",
            ],
        ),
    ],
    ids=lambda v: "-".join(map(str, v[:2])) if isinstance(v, list) else None,
)
def test_bad_options(monkeypatch, host, args, words, options):
    flags = [a for a in args if a.startswith("--")] + (["64"] if "64" in args else [])
    opts = [a for a in args if a not in flags]
    message = fails(monkeypatch, host, *flags, *options, *opts)
    for word in words:
        assert word in message


@every_host
def test_missing_and_broken_files(monkeypatch, host, options, tmp_path):
    def message(*args, **kwargs):
        return fails(monkeypatch, host, *args, **kwargs)

    assert "no file nowhere.yaml" in message(config="nowhere.yaml")
    for text, words in [
        ("MODEL: [", " is not a config file"),
        ("just words", " is not a config file"),
        ("MODEL: !!python/name:os.system x", ": MODEL: the tag !!python/name:os.system is not"),
    ]:
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        assert f"broken.yaml{words}" in message(config=str(path))
    path.write_text(f"_BASE_: {tmp_path}/nowhere.yaml")
    assert "nowhere.yaml" in message(config=str(path))

    annotations = tmp_path / "a.json"
    sets = ast.literal_eval(options[options.index("DATASETS.REGISTER_COCO") + 1])
    sets.append(["mine", str(annotations), "x"])
    register = ["DATASETS.REGISTER_COCO", repr(sets), "DATASETS.TRAIN", "('mine',)"]
    assert "mine: there is no annotation file" in message(*options, *register)
    for text, words in [("{", "not valid JSON"), ("{}", "COCO's format")]:
        annotations.write_text(text)
        found = message(*options, *register)
        assert words in found and str(annotations) in found
    # Found before the training, not after it.
    content = json.loads(Path(sets[0][1]).read_text())
    del content["annotations"][0]["area"]
    annotations.write_text(json.dumps(content))
    found = message(*options, *register[:2], "DATASETS.TEST", "('mine',)")
    assert str(annotations) in found and "area: None is not accepted" in found
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert "coco_2017_train" in message(*options, "DATASETS.TRAIN", "('coco_2017_train',)")


@every_host
def test_checkpoints_that_do_not_fit(monkeypatch, host, options, tmp_path):
    def message(*args):
        return fails(monkeypatch, host, *args)

    broken = tmp_path / "broken.pth"
    for scheme in ("s3", "detectron2"):
        found = message(*options, "MODEL.WEIGHTS", f"{scheme}://nowhere/x.pkl")
        assert f"{scheme}://nowhere/x.pkl" in found
    broken.write_bytes(b"no checkpoint")
    assert f"{broken}: cannot be loaded" in message(*options, "MODEL.WEIGHTS", broken)
    torch.save({"model": {"a": torch.zeros(1)}}, broken)
    found = message(*options, "MODEL.WEIGHTS", broken)
    assert (
        "no weights with the names of this config's model: its first is 'a', the model's" in found
    )
    starts = {"detectron2": "backbone.body.conv1", "torchvision": "backbone.bottom_up.stem.conv1"}
    torch.save({"model": {f"{starts[host]}.weight": torch.zeros(1)}}, broken)
    (other,) = starts.keys() - {host}
    found = message(*options, "MODEL.WEIGHTS", broken)
    assert f"use --host {other}" in found and other in found.lower()

    succeeds(host, *options, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"]
    other = ["MODEL.FPN.OUT_CHANNELS", "32"]
    for flags in ([], ["--eval-only"], ["--resume"]):
        found = message(*options, *weights, *flags, *other)  # flags anywhere
        assert "the checkpoint has shape" in found and "(64, " in found and "(32, " in found
    more = ["MODEL.RETINANET.NUM_CLASSES", "7"]
    # Detectron2's host compares with the data set first.
    refused = {"detectron2": "NUM_CLASSES: 7 is not accepted", "torchvision": "cls_"}
    assert refused[host] in message("--eval-only", *options, *weights, *more)
    lacking = ["MODEL.RETINANET.BN.AFFINE", "per_domain"]
    assert "the checkpoint lacks it" in message("--eval-only", *options, *weights, *lacking)
    # Fine-tuning on other classes is not an error.
    succeeds(host, *options, *weights, *more, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")


def test_what_the_torchvision_host_refuses(monkeypatch, options):
    def message(*args):
        return fails(monkeypatch, "torchvision", *args)

    found = message(*options, "MODEL.KEYPOINT_ON", "True")
    assert "MODEL.KEYPOINT_ON" in found and "torchvision host does not know" in found
    lazy = str(ROOT / "configs" / "ways" / "GN.py")
    found = fails(monkeypatch, "torchvision", "train.max_iter=3", config=lazy)
    assert f"{lazy} is not accepted: LazyConfig files are for bn-det train on Det" in found
    found = message(*options, "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert "MODEL.WEIGHTS: 'detectron2://" in found and "cannot be resolved" in found


@pytest.mark.skipif(INSTALLED, reason="Detectron2 is installed")
def test_detectron2_is_asked_for_and_missing(capsys, monkeypatch):
    found = fails(monkeypatch, "detectron2")
    assert "--host: 'detectron2' is not installed" in found
