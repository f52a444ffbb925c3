"""tools/recompute_statistics.py on models of other projects."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from bn_det import fuse, update_bn_stats
from here import run_here

PROJECT = """
import os
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def nothing():
    return 3

def batches():
    torch.manual_seed(1)
    return [{"image": torch.randn(4, 3, 5, 5) + k} for k in range(5)]

def call(model, batch):
    return model(batch["image"])

def takes_one(argument):
    pass

def elsewhere():
    os.chdir("elsewhere")
    return make()

def batches_elsewhere():
    os.chdir("elsewhere")
    return batches()

def with_a_neighbour():
    import neighbour
    return make()

def batches_of_a_neighbour():
    import neighbour
    return batches()

def on_no_device():
    with torch.device("meta"):
        return make()
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "other_project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.normal_(model[1].running_mean)
    return model


def run(*args):
    return run_here("tools/recompute_statistics.py", *args)


FLAGS = ("--model", "other_project:make", "--data", "other_project:batches", "--call",
         "other_project:call", "--weights", "old.pth")  # fmt: skip


@pytest.mark.parametrize("node", ["model", "state_dict", None])
def test_file_to_file(project, node, tmp_path):
    """The checkpoint is as it was, but for the statistics, which are those of the batches."""
    state = project.state_dict()
    old = {node: state, "epoch": 3, "optimizer": {"lr": 0.1}} if node else state
    torch.save(old, "old.pth")
    done = run(*FLAGS, "--output", "made/new.pth")
    assert done.returncode == 0, done.stderr
    new = torch.load("made/new.pth", weights_only=True)
    assert new.keys() == old.keys() and new.get("epoch") == old.get("epoch")
    found = new[node] if node else new
    namespace = {}
    exec(PROJECT, namespace)
    expected = namespace["make"]()
    expected.load_state_dict(state)
    update_bn_stats(expected.train(), namespace["batches"](), 5, call=namespace["call"])
    torch.testing.assert_close(dict(found), dict(expected.state_dict()), rtol=0, atol=0)
    assert json.loads((tmp_path / "made/new.json").read_text())["num_batches"] == 5
    assert "Furthest from the new ones: 1 (mean by" in done.stdout
    looked = run(*FLAGS, "--num-iters", "2")
    assert looked.returncode == 0 and "2 batches, 8 samples" in looked.stdout


def test_a_function_may_import_what_is_beside_it(project, tmp_path):
    """As by the command bn-det, whose own folder is the first on the path."""
    (tmp_path / "neighbour.py").touch()
    torch.save(project.state_dict(), "old.pth")
    flags = [*FLAGS, "--model", "other_project:with_a_neighbour"]
    flags += ["--data", "other_project:batches_of_a_neighbour"]
    done = run(*flags, "--num-iters", "2")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_model_that_was_saved_in_a_wrapper(wrapper, project, tmp_path):
    """Its names begin with "module."; they still do in the file that is written."""
    state = wrapper(project).state_dict()
    torch.save({"model": state}, tmp_path / "old.pth")
    done = run(*FLAGS, "--output", "new.pth")
    assert done.returncode == 0, done.stderr
    new = torch.load(tmp_path / "new.pth", weights_only=True)["model"]
    assert new.keys() == state.keys()
    assert not new["module.1.running_mean"].equal(state["module.1.running_mean"])
    assert new["module.0.weight"].equal(state["module.0.weight"])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--weights", "old.pth"], "--config-file or --model: one of them is needed"),
        ([*FLAGS, "--config-file", "x.yaml"], "--config-file or --model: one of them is needed"),
        ([*FLAGS[:2], *FLAGS[-2:]], "--data: is needed with --model"),
        ([*FLAGS, "--model", "other_project"], "--model: 'other_project' is not accepted; use MOD"),
        ([*FLAGS, "--model", "nowhere:make"], "'nowhere:make' cannot be imported: No module named"),
        ([*FLAGS, "--data", "other_project:none"], "--data: .* cannot be imported: .* 'none'"),
        ([*FLAGS, "--model", "other_project:nothing"], "gave a int, and no module"),
        ([*FLAGS, "--data", "other_project:takes_one"], "cannot be called without arguments"),
        ([*FLAGS, "--weights", "none.pth"], "none.pth: there is no such file"),
        ([*FLAGS, "--weights", "number.pth"], "number.pth: it has no weights by name"),
        ([*FLAGS, "--weights", "other.pth"], "other.pth: the weights do not fit the model: .*1.w"),
        ([*FLAGS, "--weights", "fused.pth"], "fused.pth: .* is of a fused model: 1 and 0 more are"),
        ([*FLAGS, "--num-iters", "0"], "error: --num-iters: 0 is not accepted; use 1 or more"),
        ([*FLAGS, "--num-iters", "-2"], "error: --num-iters: -2 is not accepted; use 1 or more"),
        ([*FLAGS, "--tolerance", "-1"], "error: --tolerance: -1.0 is not accepted; use 0.0"),
        ([*FLAGS, "--output", "old.pth"], "--output: 'old.pth' is not accepted"),
        ([*FLAGS, "--evaluate"], "--evaluate: is not accepted with --model"),
        ([*FLAGS, "--num-gpus", "2"], "--num-gpus: is not accepted with --model"),
        ([*FLAGS, "--host", "torchvision"], "--host: is not accepted with --model"),
        ([*FLAGS, "SOLVER.BASE_LR", "1"], "KEY VALUE: is not accepted with --model"),
        (
            ["--weights", "old.pth", "--config-file", "x.yaml", "--call", "a:b"],
            "--call: is not accepted with --config-file",
        ),
    ],
)
def test_bad_input(project, args, words):
    torch.save(project.state_dict(), "old.pth")
    torch.save(3, "number.pth")
    torch.save({"1.weight": torch.zeros(2)}, "other.pth")
    fused = copy.deepcopy(project).eval()
    fuse(fused)
    torch.save(fused.state_dict(), "fused.pth")
    before = torch.load("old.pth", weights_only=True)
    done = run(*args)
    assert done.returncode == 1
    assert re.search(words, done.stderr), done.stderr
    torch.testing.assert_close(torch.load("old.pth", weights_only=True), before, rtol=0, atol=0)


def test_a_function_that_changes_the_folder(project, tmp_path):
    """Files are those of the folder in which the command began."""
    (tmp_path / "elsewhere").mkdir()
    torch.save(project.state_dict(), "elsewhere/old.pth")
    before = (tmp_path / "elsewhere" / "old.pth").read_bytes()
    flags = ["other_project:elsewhere" if of == "other_project:make" else of for of in FLAGS]
    flags[-1] = "elsewhere/old.pth"
    done = run(*flags, "--output", "old.pth")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "old.pth").is_file()
    for script, *args in (
        ("tools/doctor.py", "--output", "page.txt"),
        ("tools/doctor.py", "--treat", "treated.pth", "--num-iters", "5"),
    ):
        done = run_here(script, "elsewhere/old.pth", *flags[:-2], *args)
        assert "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "page.txt").is_file()
    target = "--target", "other_project:batches_elsewhere", "--output", "of_target.txt"
    done = run_here("tools/doctor.py", "elsewhere/old.pth", *FLAGS[:-2], *target)
    assert (tmp_path / "of_target.txt").is_file(), done.stderr
    assert (tmp_path / "elsewhere" / "old.pth").read_bytes() == before
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["old.pth"]


def test_a_model_without_values(project):
    torch.save(project.state_dict(), "old.pth")
    flags = ["other_project:on_no_device" if of == "other_project:make" else of for of in FLAGS]
    done = run(*flags)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: --model: on the meta device, where nothing has a value: 0.weight and 6 more; load"
    )
