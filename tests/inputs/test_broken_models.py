"""Models whose outputs are NaN or infinite, in the commands of both hosts: one line, no "inf"."""

import json

import pytest
import torch

from here import run_here
from hosts import build_model, detectron2, every_host, make_cfg
from reference import BASE, RCNN_BASE

HUGE = 3e38
CONFIDENT = ("cls_score.bias", "cls_logits.bias")
OF_BOXES = ("bbox_pred.weight", "bbox_reg.weight")
OF_PROPOSALS = ("anchor_deltas.weight", "objectness_logits.weight")


@pytest.fixture
def project(tiny_shapes, tmp_path):
    """Writes a checkpoint that is broken by a function of name and tensor; calls commands on it."""

    class Project:
        weights = tmp_path / "model.pth"

        def write(self, host, config, change):
            self.opts = *tiny_shapes, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")
            self.opts += "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"
            self.opts += "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"
            self.opts += "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"
            self.config = "--host", host, "--config-file", config
            state = build_model(host, make_cfg(host, config, *self.opts)).state_dict()
            torch.save({"model": {n: change(n, v) for n, v in state.items()}}, self.weights)

        def run(self, script, *args):
            opts = *self.opts, "MODEL.WEIGHTS", str(self.weights)
            return run_here(f"tools/{script}.py", *self.config, *args, *opts)

    return Project()


def filled(*ends):
    def change(name, value):
        return torch.full_like(value, HUGE) if name.endswith(ends) else value

    return change


def infinite_boxes(name, value):
    """Of detections that are sure of themselves."""
    return torch.full_like(value, 3) if name.endswith(CONFIDENT) else filled(*OF_BOXES)(name, value)


def error_of(done):
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("host", [detectron2])
def test_boxes_in_evaluation(host, project):
    """Detectron2 asserts that they are finite; none of them is right, to the doctor."""
    project.write(host, BASE, infinite_boxes)
    line = error_of(project.run("train_net", "--eval-only"))
    assert line.startswith(f"error: MODEL.WEIGHTS: {project.weights}: its outputs are NaN or infin")
    done = project.run("doctor", "--num-iters", "5", "--evaluate", "--format", "json")
    tried = json.loads(done.stdout)["tried"]
    assert [of["before"] for of in tried] == [0.0]


@pytest.mark.parametrize("host", [detectron2])
def test_boxes_do_not_keep_from_a_repair(host, project):
    def negative(name, value):
        if name.endswith("running_var") and "bbox_subnet" in name:
            return -value
        return torch.full_like(value, 3) if name.endswith(CONFIDENT) else value

    project.write(host, BASE, negative)
    args = "--num-iters", "2", "--evaluate", "--weights", project.weights
    done = project.run("recompute_statistics", *args)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("With the statistics after")
    assert "|  -   |" in before and "AP50" in after


@pytest.mark.parametrize("host", [detectron2])
def test_proposals_in_training_mode(host, project, tmp_path):
    """What Detectron2 raises of them, FloatingPointError."""
    project.write(host, RCNN_BASE, filled(*OF_PROPOSALS))
    line = error_of(project.run("measure_leakage", "--images-per-batch", "2"))
    assert line.startswith(f"error: MODEL.WEIGHTS: {project.weights}: its outputs are NaN or infin")
    args = "--num-iters", "2", "--weights", project.weights
    line = error_of(project.run("recompute_statistics", *args))
    assert line.startswith("error: batch 0: Predicted boxes or scores contain Inf/NaN")
    for more in ((), ("--evaluate",)):
        done = project.run("doctor", "--num-iters", "6", *more)
        assert "batch 0: Predicted boxes" in done.stdout + done.stderr, done.stderr
    paths = project.weights, project.weights
    args = "--inputs", *paths, "--statistics", "copied", "--output", tmp_path / "new.pth"
    assert "no average of " in error_of(project.run("average_checkpoints", *args))


@every_host
def test_a_training_that_fails(host, project):
    project.write(host, BASE, lambda name, value: value)
    opts = "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "4"
    line = error_of(project.run("train_net", *opts))
    assert "not finite at iteration" in line or "became infinite or NaN at iteration" in line


@every_host
def test_losses_that_are_no_numbers(host, project, tmp_path):
    """Finite weights with which the population statistics lead to NaN, and the batch does not."""
    project.write(host, BASE, lambda n, v: v * 1e30 if n.endswith("conv1.weight") else v)
    done = project.run("measure_loss", "--images-per-batch", "2")
    assert done.returncode == 0 and "RuntimeWarning" not in done.stderr
    cells = [line.split("|")[2].strip() for line in done.stdout.splitlines() if "|" in line][2:]
    assert cells[0] == cells[2] == "NaN" and cells[1][-1] == "]"
    with open(tmp_path / "out" / "loss.json") as file:
        found = json.load(file, parse_constant=pytest.fail)
    assert found["population"] == {"value": None, "low": None, "high": None}
