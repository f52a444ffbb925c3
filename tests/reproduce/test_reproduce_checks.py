"""What tools/reproduce.py accepts on machines with GPUs. They are counted, not used."""

import argparse

import pytest
import torch

from bn_det.errors import InputError
from bn_det.reproduce.checks import check_arguments, check_data, check_options
from bn_det.reproduce.main import plan
from bn_det.reproduce.registry import experiments_on
from bn_det.reproduce.steps import DATA, Setting


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A function of the number of GPUs, the experiment and other arguments; COCO is there."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / split).mkdir(parents=True)
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").touch()

    def run(here, experiment, **others):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here > 0)
        usual = {"seeds": 1, "num_gpus": None, "jobs": None, "opts": [], "yes": False}
        args = {"experiment": experiment, "data": "coco", "dry_run": False, **usual, **others}
        check_arguments(argparse.Namespace(**args), [experiment])

    return run


def test_the_published_number_of_gpus(check):
    check(8, "leakage")
    check(9, "leakage", jobs=1)


def test_fewer_gpus_say_what_changes_and_ask(check):
    words = "8 images a step instead of 16; the learning rate is scaled by 0.5"
    with pytest.raises(InputError, match=words) as error:
        check(4, "leakage")
    assert "this machine has 4 GPUs" in str(error.value)
    assert "add --num-gpus 4 --yes" in str(error.value)
    with pytest.raises(InputError, match=f"{words}.*Add --yes to run it so"):
        check(4, "leakage", num_gpus=4)
    check(4, "leakage", num_gpus=4, yes=True)
    check(0, "leakage", num_gpus=4, dry_run=True)


def test_one_gpu(check, capsys):
    """Enough where no batch of several GPUs is looked at."""
    check(1, "multi-domain", num_gpus=1, yes=True)
    assert "the learning rate is scaled by 0.125" in capsys.readouterr().out
    for name in ("leakage", "batch-size"):
        with pytest.raises(InputError, match=f"1 is not accepted with {name}.* use 2 or more"):
            check(1, name, num_gpus=1, yes=True)
        with pytest.raises(InputError, match=r"use one with as many, or --data shapes"):
            check(1, name)


def test_commands_at_the_same_time_on_gpus(check):
    with pytest.raises(InputError, match=r"--jobs: 2 is not accepted with --data coco on GPUs"):
        check(8, "leakage", jobs=2)
    check(8, "leakage", jobs=2, data="shapes")


def test_cells_that_are_not_there(check):
    words = r"'cells' is not accepted: there is no .*bccd_train.json; bn-det prepare-blood-cells"
    with pytest.raises(InputError, match=words):
        check(0, "population", data="cells")
    check(0, "population", data="cells", dry_run=True)
    with pytest.raises(InputError, match="--num-gpus: 2 is not accepted with --data cells"):
        check(0, "population", data="cells", num_gpus=2)


@pytest.mark.parametrize("experiment, data", [("correlated", "coco"), ("frozen", "cells")])
def test_experiments_that_some_data_does_not_have(experiment, data):
    with pytest.raises(InputError, match=f"--data: '{data}' is not accepted with {experiment}, "):
        check_data(experiment, data)
    check_data(experiment, "shapes")
    check_data("all", data)


@pytest.mark.parametrize("experiment", ["leakage", "population", "doctor", "multi-domain"])
def test_options_by_which_a_measured_checkpoint_is_not_saved(tmp_path, experiment):
    """Refused before the first training; multi-domain looks at the end alone."""
    measured = {"leakage": 500, "population": 90, "doctor": 90}.get(experiment)
    for opts in (
        ("SOLVER.MAX_ITER", "80"),
        ("SOLVER.CHECKPOINT_PERIOD", "501"),
        ("SOLVER.MAX_ITER", "1500", "SOLVER.CHECKPOINT_PERIOD", "501"),
    ):
        setting = Setting("shapes", "torchvision", tmp_path, opts=opts)
        steps = plan([experiment], setting, [1])
        if measured is None:
            check_options(steps, setting)
            continue
        words = rf"not accepted with train/.*, whose checkpoint of iteration {measured} is measured"
        with pytest.raises(InputError, match=words):
            check_options(steps, setting)
    longer = Setting("shapes", "torchvision", tmp_path, opts=("SOLVER.MAX_ITER", "3000"))
    check_options(plan([experiment], longer, [1]), longer)


@pytest.mark.parametrize("data", DATA)
def test_every_plan_has_the_checkpoints_that_it_measures(tmp_path, data):
    """With an option that changes nothing of it."""
    setting = Setting(data, "torchvision", tmp_path, opts=("SOLVER.MOMENTUM", "0.9"))
    if data == "coco":
        opts = ("MODEL.WEIGHTS", "r50.pth", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
        setting = setting._replace(opts=opts)
    names = [name for name in experiments_on(data) if name != "normalizer-free"]
    check_options(plan(names, setting, [1]), setting)


def test_weights_to_begin_with_are_not_what_is_measured(tmp_path):
    for data in ("shapes", "coco"):
        opts = ("MODEL.WEIGHTS", "pre/model_0004998.pth", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
        setting = Setting(data, "torchvision", tmp_path, opts=opts)
        check_options(plan(["leakage"], setting, [1]), setting)


def test_options_that_no_config_has(tmp_path):
    for key, value in (("SOLVER.MAXITER", "3"), ("SOLVER.MAX_ITER", "three")):
        setting = Setting("shapes", "torchvision", tmp_path, opts=(key, value))
        with pytest.raises(InputError, match=key):
            check_options(plan(["multi-domain"], setting, [1]), setting)
