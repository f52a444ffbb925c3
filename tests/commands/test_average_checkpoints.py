"""tools/average_checkpoints.py on both hosts."""

import json
import re

import pytest
import torch
from torch import nn

from bn_det import fuse
from export import make_model
from here import run_here
from hosts import every_host
from reference import BASE, RCNN_BASE


def run(host, config, paths, *args):
    flags = ("--host", host, "--config-file", config, "--inputs", *paths)
    return run_here("tools/average_checkpoints.py", *flags, *args)


@every_host
@pytest.mark.parametrize("config", [BASE, RCNN_BASE], ids=["retinanet", "rcnn"])
def test_the_best_is_written(host, config, tiny_shapes, tmp_path):
    paths = []
    model = make_model(host, config)
    for k in range(2):
        torch.manual_seed(k)
        for name, t in model.state_dict().items():
            if name.endswith("running_mean"):
                nn.init.normal_(t, std=0.1)
            elif t.dim() > 1:
                t.mul_(1 + 0.01 * torch.randn_like(t))
        paths.append(tmp_path / f"{k}.pth")
        # One of them as it is saved in a wrapper.
        state = nn.DataParallel(model).state_dict() if k else model.state_dict()
        torch.save({"model": state, "iteration": k}, paths[-1])
    output = tmp_path / "made" / "average.pth"
    opts = (*tiny_shapes, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"),
            "SOLVER.IMS_PER_BATCH", "2", "TEST.PRECISE_BN.NUM_ITER", "2")  # fmt: skip
    done = run(host, config, paths, "--output", output, *opts)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.with_suffix(".json").read_text())
    choices = ["copied", "averaged", "pooled", "recomputed"]
    assert list(report["losses"]) == [*map(str, paths), *choices]
    best = min(choices, key=report["losses"].__getitem__)
    assert report["statistics"] == best and f"with statistics {best}" in done.stdout
    states = [torch.load(p, weights_only=True)["model"] for p in paths]
    states[1] = {name.removeprefix("module."): v for name, v in states[1].items()}
    found = torch.load(output, weights_only=True)["model"]
    for name, value in found.items():
        if "running" not in name and value.is_floating_point():
            mean = (states[0][name].double() + states[1][name].double()) / 2
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
    again = run(host, config, [paths[0], output], "--statistics", "copied", "--output",
                tmp_path / "again.pth", *opts)  # fmt: skip
    assert again.returncode == 0, again.stderr
    losses = json.loads((tmp_path / "again.json").read_text())["losses"]
    # What was measured is what was written.
    assert losses[str(output)] == pytest.approx(report["losses"][best], rel=1e-5)


@every_host
def test_what_does_not_fit_is_refused_before_the_work(host, tiny_shapes, tmp_path):
    """In one line, which says whose it is, and not with every key that is missing."""
    model = make_model(host, BASE)
    state = dict(model.state_dict())
    first = next(iter(state))
    fuse(model)
    other = "detectron2" if host == "torchvision" else "torchvision"
    contents = {
        "own": state,
        "other": {f"{STARTS[other]}.weight": torch.zeros(1)},
        "fused": model.state_dict(),
        "lacking": {name: value for name, value in state.items() if name != first},
        "larger": {**state, "more": torch.zeros(1)},
        "reshaped": {name: value.new_zeros(3, 5, 7) for name, value in state.items()},
        "nothing": {},
    }
    for name, content in contents.items():
        torch.save({"model": content}, tmp_path / f"{name}.pth")
    opts = (*tiny_shapes, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"))
    for name, words in [
        ("other", f"has no weights .*: they are those of a detector of .*use --host {other}"),
        ("fused", "is of a fused model: "),
        ("lacking", f"do not fit the model: .*{first}"),
        ("larger", "do not fit the model: .*more"),
        ("reshaped", "do not fit the model: .*size mismatch"),
        ("nothing", "has no weights with the names of this config's model: it has none"),
    ]:
        paths = [tmp_path / f"{n}.pth" for n in ("own", name)]
        done = run(host, BASE, paths, "--output", tmp_path / "out.pth", *opts)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and error.startswith(f"error: --inputs: {paths[1]}: the ")
        assert re.search(words, error) and len(error) < len(str(tmp_path)) + 500
        assert "Losses of" not in done.stdout + done.stderr


STARTS = {"torchvision": "backbone.body.conv1", "detectron2": "backbone.bottom_up.stem.conv1"}


def test_bad_input(tiny_shapes, tmp_path):
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint")
    for paths, output, words in [
        ([text], "out.pth", "--inputs: one checkpoint is not accepted"),
        ([text, "none.pth"], "out.pth", "--inputs: there is no file none.pth"),
        ([text, text], text, "--output: "),
        ([text, text], tmp_path / "out.pth", "text.pth: cannot be loaded as a checkpoint"),
    ]:
        opts = (*tiny_shapes, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"))
        done = run("torchvision", BASE, paths, "--output", output, *opts)
        assert done.returncode == 1 and words in done.stderr, done.stderr
