"""tools/doctor.py as its users call it."""

import ast
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn

from bn_det.doctor import RULES
from here import ROOT, run_here
from hosts import build_model, every_host, make_cfg
from reference import BASE


def doctor(*args):
    return run_here("tools/doctor.py", *args)


def recompute_as_printed(command):
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("bn-det", "recompute")
    return run_here("tools/recompute_statistics.py", *arguments)


@pytest.fixture
def broken(tmp_path):
    """A file with one error, one warning and one note."""
    state = nn.Sequential(*[nn.BatchNorm2d(4) for _ in range(5)]).state_dict()
    for k in range(5):
        state[f"{k}.running_mean"] = torch.randn(4)
        state[f"{k}.num_batches_tracked"] = torch.tensor(100)
    state["1.running_var"][2] = float("nan")
    state["2.num_batches_tracked"] += 1
    state["3.running_var"][0] = 0.0
    torch.save(state, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_table_and_exit_status(broken):
    command = [sys.executable, ROOT / "tools/doctor.py", broken]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("statistics, weight or bias are NaN or infinite, in 1 (BN107); ")
    for rule in ("BN107", "BN112", "BN111"):
        assert rule in done.stdout
    for fail_on, status in (("never", 0), ("note", 3)):
        assert doctor(broken, "--fail-on", fail_on).returncode == status
    done = doctor(broken, "--ignore", "BN107", "--fail-on", "warning")
    assert done.returncode == 3 and "BN107" not in done.stdout
    few = "--select", "BN10", "--select", "BN111", "--ignore", "BN107"
    done = doctor(broken, *few)
    assert done.returncode == 0 and "BN111" in done.stdout and "BN112" not in done.stdout


def test_json(broken):
    found = json.loads(doctor(broken, "--format", "json").stdout)
    assert set(found) == {"verdict", "findings", "layers", "tried", "in_evaluation", "on_target"}
    first, *_ = found["findings"]
    assert first["rule"] == "BN107" and first["severity"] == "error" and first["where"] == ["1"]
    assert set(first) == {
        *("rule", "severity", "where", "value", "standard_error", "why", "treatment"),
        *("gain", "measure", "untried"),
    }
    assert [of["severity"] for of in found["findings"]] == ["error", "warning", "note"]


def test_a_page_and_sarif(broken):
    done = doctor(broken, "--format", "html")
    assert done.returncode == 3 and done.stdout.startswith("<!DOCTYPE html>")
    assert f"<code>{broken}</code>" in done.stdout and '<b class="error">error BN107' in done.stdout
    done = doctor(broken, "--format", "sarif")
    assert done.returncode == 3
    results = json.loads(done.stdout)["runs"][0]["results"]
    assert [of["ruleId"] for of in results] == ["BN107", "BN112", "BN111"]
    file = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert file == {"uri": broken.as_uri()}


@pytest.mark.parametrize("form", ["table", "json", "html", "sarif"])
def test_output(form, broken, tmp_path):
    """A file of what is printed without; the terminal has the table."""
    path = tmp_path / "new" / "report"
    done = doctor(broken, "--format", form, "--output", path)
    assert done.returncode == 3, done.stderr
    table = doctor(broken).stdout
    assert done.stdout == f"{table}Saved to {path}\n"
    printed = doctor(broken, "--format", form).stdout
    assert path.read_text() == printed.removesuffix("\n")
    assert [of.name for of in path.parent.iterdir()] == ["report"]


PROJECT = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def batches():
    torch.manual_seed(1)
    return [{"image": torch.randn(4, 3, 5, 5)} for k in range(9)]

def dark():
    return [{"image": batch["image"] / 3 - 2} for batch in batches()]

def call(model, batch):
    return model(batch["image"])
"""


def test_a_model_of_another_project(tmp_path, monkeypatch):
    (tmp_path / "a_project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_mean += 9
    model[1].num_batches_tracked += 1000
    torch.save({"state_dict": model.state_dict()}, "model.pth")
    flags = "--model", "a_project:make", "--data", "a_project:batches", "--call", "a_project:call"
    done = doctor("model.pth", *flags, "--format", "json")
    assert done.returncode == 3, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["rule"] == "BN201" and finding["where"] == ["1"]
    assert finding["value"] > 5 and finding["standard_error"] > 0
    target = "--target", "a_project:dark"
    done = doctor("model.pth", *flags, *target, "--select", "BN205", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (finding,) = found["findings"]
    assert finding["where"] == ["1"] and [of["name"] for of in found["on_target"]] == ["1"]
    # The command that it names adapts to the target.
    command = finding["treatment"].partition(" takes ")[0]
    done = recompute_as_printed(command)
    assert done.returncode == 0, done.stderr
    adapted = torch.load("adapted.pth", weights_only=True)["state_dict"]["1.running_mean"]
    images = torch.cat([batch["image"] for batch in a_project().dark()])
    expected = model[0](images).mean((0, 2, 3))
    torch.testing.assert_close(adapted, expected.detach(), atol=1e-5, rtol=1e-4)


def a_project():
    """The module, which the command has imported."""
    return sys.modules["a_project"]


BROKEN_PROJECT = (
    PROJECT
    + """
import sys

def ends(*_):
    sys.exit(0)

def data():
    yield {"image": torch.randn(4, 3, 5, 5)}
    raise KeyError("image_id")
"""
)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "b_project:ends"], "--model: it cannot be called without arguments: SystemEx"),
        (["--call", "b_project:ends"], "--call: the model cannot be called on a batch"),
        (["--data", "b_project:data"], "--data: b_project:data: KeyError: "),
        (
            ["--treat", "new.pth", "--output", "./new.json"],
            "--output: './new.json' is not accepted",
        ),
        (
            ["--treat", "weights.pth"],
            "--treat, the table: 'weights.json' is not accepted; use anot",
        ),
    ],
)
def test_a_project_that_does_not_work(tmp_path, monkeypatch, flags, words):
    (tmp_path / "b_project.py").write_text(BROKEN_PROJECT)
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict(), "weights.json")
    of = {"model": "b_project:make", "data": "b_project:batches", "call": "b_project:call"}
    usual = [word for name, value in of.items() for word in (f"--{name}", value)]
    done = doctor("weights.json", *usual, *flags)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {words}")
    assert {*os.listdir(tmp_path)} <= {"__pycache__", "b_project.py", "weights.json"}


LOSSES = """
import torch
from torch import nn
from torch.nn.functional import mse_loss

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 5, 5) for k in range(12)]

def call(model, batch):
    y = model(batch)
    return mse_loss(y, (y - y.mean((0, 2, 3), keepdim=True)).detach())
"""


@pytest.mark.parametrize("part", ["model", "ema"])
def test_treat(part, tmp_path, monkeypatch):
    """A mean that is off by 3, and a loss that tells; what else is in the file stays."""
    (tmp_path / "losses_project.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_mean += 3
    model[1].num_batches_tracked += 1000
    torch.save({part: model.state_dict(), "epoch": 7}, "model.pth")
    names = {"model": "make", "data": "batches", "call": "call"}
    flags = [f for flag, name in names.items() for f in (f"--{flag}", f"losses_project:{name}")]
    flags += "--part", part
    done = doctor("model.pth", *flags, "--treat", "mended.pth", "--format", "json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    (tried,) = found["tried"]
    assert tried["kept"] and tried["measure"] == "loss" and tried["gain"] > 1
    assert found["verdict"].startswith("statistics, not weights: ")
    assert found["verdict"].endswith("; mended.pth has them")
    assert json.loads(Path("mended.json").read_text())["verdict"] == found["verdict"]
    gains = {of["rule"]: of["gain"] for of in found["findings"]}
    assert gains["BN301"] == gains["BN201"] > 1
    mended = torch.load("mended.pth", weights_only=True)
    assert mended["epoch"] == 7 and not torch.equal(
        mended[part]["1.running_mean"], model[1].running_mean
    )
    again = doctor("mended.pth", *flags, "--treat", "again.pth", "--num-iters", "6")
    assert again.returncode == 0 and "again.pth is not written" in again.stderr
    assert not (tmp_path / "again.pth").exists()
    # The command that the doctor prints mends it, too.
    recompute = next(of["treatment"] for of in found["findings"] if of["rule"] == "BN201")
    done = recompute_as_printed(recompute)
    assert done.returncode == 0, done.stderr
    assert torch.load("mended.pth", weights_only=True)["epoch"] == 7


def with_dark(tiny_shapes, folder):
    """The options, with a data set of its test images in the dark."""
    key, sets, *rest = tiny_shapes
    (_, annotations, images) = ast.literal_eval(sets)[1]
    folder.mkdir()
    for path in Path(images).iterdir():
        cv2.imwrite(str(folder / path.name), cv2.imread(str(path)) // 8)
    sets = [*ast.literal_eval(sets), ["tiny_dark", annotations, str(folder)]]
    return [key, repr(sets), *rest]


@every_host
def test_a_config(host, tiny_shapes, tmp_path, monkeypatch):
    options = with_dark(tiny_shapes, tmp_path / "dark")
    small = *options, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"
    model = build_model(host, make_cfg(host, BASE, *small))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer += 1000
        if name.endswith("running_mean"):
            buffer += 5
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    done = doctor(
        *("--host", host, "--num-iters", 3, "--config-file", BASE, *small),
        *("MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR", tmp_path / "run"),
        *("--format", "html", "--output", tmp_path / "page.html"),
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("statistics do not fit the weights, in ")
    page = (tmp_path / "page.html").read_text()
    assert f"<code>{tmp_path / 'model.pth'}</code>" in page
    assert "Shift of the mean" in page and 'class="bad"' in page
    done = doctor(
        *("--host", host, "--num-iters", 5, "--config-file", BASE, *small, "--evaluate"),
        *("MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR", tmp_path / "run"),
        *("--format", "json", "--target", "tiny_dark"),
    )
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    tried = found["tried"]
    assert {of["measure"] for of in tried} == {"AP"} and not any(of["kept"] for of in tried)
    of_target = [of for of in tried if of["on_target"]]
    assert [of["rules"] for of in of_target] == [["BN205"]]
    names = [of["name"] for of in found["layers"]]
    for part in ("in_evaluation", "on_target"):
        assert [of["name"] for of in found[part]] == names, part
    treatments = {of["rule"]: of["treatment"] for of in found["findings"]}
    assert f"--host {host} --adabn" in treatments["BN205"] and "OUTPUT_DIR" not in str(treatments)
    # As it stands there it runs: with this host and these options.
    monkeypatch.chdir(tmp_path)
    done = recompute_as_printed(treatments["BN201"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mended.pth").is_file()
    assert not (tmp_path / "run" / "inference").exists()


@every_host
def test_how_a_config_trains(host, tiny_shapes, tmp_path):
    """By the optimizer that the host makes of it, and in processes that are not started."""
    small = *tiny_shapes, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "4"
    model = build_model(host, make_cfg(host, BASE, *small))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")

    def found(*args):
        done = doctor(
            *("--host", host, "--num-iters", 2, "--config-file", BASE, *small, "--select", "BN5"),
            *("MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR", tmp_path / "run"),
            *("INPUT.MIN_SIZE_TRAIN", "(64,)", "--format", "json", *args),
        )
        assert done.returncode == 0, done.stderr
        return {of["rule"]: of for of in json.loads(done.stdout)["findings"]}

    # Whatever the batches are that are examined.
    assert found("TEST.PRECISE_BN.IMS_PER_BATCH", 2) == {}
    of_two = found("--num-gpus", 2, "SOLVER.ACCUMULATE", 3, "SOLVER.WEIGHT_DECAY_NORM", 1e-4)
    assert of_two.keys() == {"BN501", "BN502"} and of_two["BN501"]["value"] == 1e-4
    assert of_two["BN502"]["value"] == 2 and "has 6 of these" in of_two["BN502"]["why"]
    more = "MODEL.WEIGHTS", tmp_path / "model.pth", "--num-gpus", 3
    done = doctor("--host", host, "--config-file", BASE, *small, *more)
    assert done.returncode == 1 and "SOLVER.IMS_PER_BATCH: 4 is not accepted" in done.stderr


@pytest.mark.parametrize("flags", ["--list", "--explain BN101"])
def test_in_front_of_what_reads_nothing(flags):
    """As head does, once it has what it wanted: of many lines and of few."""
    command = f"set -o pipefail; {sys.executable} tools/doctor.py {flags} | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "Error" not in done.stderr and done.returncode == 141, done.stderr


def test_list_and_explain():
    listed = doctor("--list").stdout
    assert all(f"{rule}: {of.name}" in listed for rule, of in RULES.items())
    assert doctor("--explain", "BN103").stdout.startswith("BN103: statistics folded")


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "FILE: 0 names are not accepted; name one checkpoint"),
        (["model.pth", "other.pth"], "FILE: 2 names are not accepted"),
        (["model.pth", "--model", "a:b"], "--data: is needed with --model"),
        (
            ["--config-file", "c.yaml", "--model", "a:b"],
            "--model: is not accepted with --config-file",
        ),
        (["--config-file", "c.yaml", "--num-iters", "0"], "--num-iters: 0 is not accepted"),
        (["nowhere.pth"], "nowhere.pth: there is no such file"),
        (["."], ".: is no file"),
        (
            ["model.pth", "--data", "a:b"],
            "--data: is not accepted with a file alone, which does not",
        ),
        (
            ["model.pth", "--num-iters", "9"],
            "--num-iters: is not accepted with a file alone, which",
        ),
        (["model.pth", "--num-gpus", "2"], "--num-gpus: is not accepted with a file alone, which"),
        (
            ["model.pth", "--model", "a:b", "--host", "torchvision"],
            "--host: is not accepted with --m",
        ),
        (
            ["--config-file", "c.yaml", "--part", "ema"],
            "--part: is not accepted with --config-file",
        ),
        (
            ["model.pth", "--select", "BN201"],
            "--select: 'BN201' is not accepted: BN201 is",
        ),
        (["model.pth", "--select", "BN1", "--select", "BN2"], "--select: 'BN2' is not accepted"),
        (["--config-file", "c.yaml", "--select", "BN3"], "BN301 is seen by losses: use --evaluate"),
        (["--config-file", "c.yaml", "--select", "BN205"], "other domain: use --target"),
        (["--config-file", "c.yaml", "--select", "BN503"], "BN503 is seen in a training alone"),
        (["model.pth", "--model", "a:b", "--select", "BN501"], "an optimizer: use --config-file"),
        (
            ["--list", "model.pth"],
            "FILE | KEY VALUE: is not accepted with --list",
        ),
        (["--explain", "BN101", "--select", "BN2"], "--select: is not accepted with --explain"),
        (["--explain", "BN101", "--list"], "--explain: is not accepted with --list"),
        (
            ["--config-file", "c.yaml", "--num-iters", "4", "--evaluate"],
            "--num-iters: 4 is not",
        ),
        (["model.pth", "--model", "a:b", "--num-iters", "4", "--treat", "t.pth"], "--num-iters: 4"),
        (["model.pth", "--ignore", ""], "--ignore: there is no rule ''"),
        ([__file__], "it is a text file"),
        (["--explain", "BN1O3"], "--explain: there is no rule 'BN1O3'; nearest names: ['BN1"),
        (["model.pth", "--select", "BN9"], "--select: there is no rule 'BN9'"),
        (["model.pth", "--part", "ema"], "--part: 'ema' is not accepted"),
        (["model.pth", "--evaluate"], "--evaluate: is not accepted with a file alone"),
        (["model.pth", "--target", "a:b"], "--target: is not accepted with a file alone"),
        (["model.pth", "--treat", "new.pth"], "--treat: is not accepted with a file alone"),
        (
            ["model.pth", "--model", "json:loads", "--data", "json:dumps", "--treat", "model.pth"],
            "--treat: 'model.pth' is not accepted; use another file than FILE",
        ),
        (["model.pth", "--output", "model.pth"], "'model.pth' is not accepted; use another file"),
        (["model.pth", "--output", "."], "--output: '.' is not accepted"),
        (["model.pth", "--output", "model.pth/x"], "--output: model.pth cannot be written to"),
        (["model.pth", "--output", "x" * 300], "--output: 'xxx"),
        (["model.pth", "--output", "x" * 300], ": File name too long; use another name"),
        (["model.pth", "--output", "x" * 251], ": File name too long; use another name"),
        (["nowhere.pth", "--output", "page.txt"], "nowhere.pth: there is no such file"),
        (["model.pth", "--output", "code.py"], "'code.py' is not accepted: it is there"),
    ],
)
def test_what_cannot_be_examined_gets_one_line(args, words, broken, monkeypatch):
    monkeypatch.chdir(broken.parent)
    (broken.parent / "code.py").touch()
    done = doctor(*args)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and words in done.stderr


@every_host
def test_levels_get_statistics_of_their_own(host, tiny_shapes, tmp_path, caplog):
    """The written checkpoint is of the config with the KEY VALUE that the verdict names."""
    shared = *tiny_shapes, "MODEL.RETINANET.BN.POPULATION", "shared", "DATASETS.TEST", "()"
    size = "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"
    small = *shared, *size, "SOLVER.IMS_PER_BATCH", "2"
    model = build_model(host, make_cfg(host, BASE, *small))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer += 1000
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # One level differs from the others, and what is normalized well is called background.
            if name.endswith(("fpn_output4.norm.bias", "fpn.layer_blocks.1.1.bias")):
                parameter += 6
            if name.endswith(("cls_score.weight", "cls_logits.weight")):
                parameter.fill_(-0.01)
            if name.endswith(("cls_score.bias", "cls_logits.bias")):
                parameter.zero_()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    command = [
        *("--host", host, "--num-iters", 12, "--config-file", BASE, "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", tmp_path / "run", "--format", "json", "--select", "BN202"),
        *("--fail-on", "never"),
    ]
    weights = "MODEL.WEIGHTS", tmp_path / "model.pth"
    done = doctor(*command, *small, *weights, "--treat", tmp_path / "mended.pth")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    needs = "; its config needs MODEL.RETINANET.BN.POPULATION per_domain from then on"
    assert found["verdict"].endswith(needs)
    assert [of["kept"] for of in found["tried"]] == [False, True], found["tried"]
    assert "to look: 12 batches, a forward pass each; to evaluate: 6 batches more" in caplog.text
    mended = torch.load(tmp_path / "mended.pth", weights_only=True)["model"]
    key = "MODEL.RETINANET.BN.POPULATION", "per_domain"
    build_model(host, make_cfg(host, BASE, *small, *key)).load_state_dict(mended)


def test_one_command_for_files_and_models(broken):
    """What is looked for in models alone is ignored in a file."""
    done = doctor(broken, "--ignore", "BN203", "--ignore", "BN107")
    assert done.returncode == 0 and "BN112" in done.stdout


def test_a_report_that_cannot_be_written_is_shown(broken):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5120, before[1]))  # as on a full disk
    try:
        done = doctor(broken, "--format", "html", "--output", broken.parent / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert done.stdout.startswith("statistics, weight or bias are NaN or infinite, in 1 (BN107); ")
    assert not (broken.parent / "page.html").exists()
