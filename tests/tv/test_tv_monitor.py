"""The monitor in torchvision's trainings."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_det.config.load import load_config
from bn_det.tv import get_cfg
from bn_det.tv.trainer import Trainer
from ranks import run_ranks
from reference import BASE

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = ["MODEL.RETINANET.BN.POPULATION", "shared"]
ACCUMULATED = ["SOLVER.ACCUMULATE", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
FROZEN = ["SOLVER.FREEZE_BN_ITER", "3", "SOLVER.FREEZE_BN_PRECISE", "False"]
SETTINGS = {
    "levels": LEVELS,
    "accumulated": ACCUMULATED,
    "frozen": FROZEN,
    "renorm": ["MODEL.RESNETS.NORM", "BRN", "SOLVER.BRN.WARMUP_ITERS", "0"],
}


@pytest.fixture
def opts(tiny_shapes):
    return [
        *("MODEL.DEVICE", "cpu", *tiny_shapes, "DATASETS.TEST", "()", "SEED", "3"),
        *("SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "0"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.BASE_LR", "0.001"),
    ]


def train(opts, folder, period, resume=False):
    """The trainer after it, what its checkpoint has, and its metrics of the monitor."""
    cfg = get_cfg()
    more = ["OUTPUT_DIR", str(folder), "TEST.BN_MONITOR", str(period)]
    load_config(cfg, BASE, [*opts, *more], "torchvision")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return trainer, [line for line in lines if any("bn_monitor" in name for name in line)]


def state_of(trainer):
    state = torch.load(trainer.checkpointer.get_checkpoint_file(), weights_only=True)
    return {**state["model"], "random": state["trainer"]["random_state"]}


@pytest.mark.parametrize("setting", SETTINGS)
def test_metrics_of_a_training_that_is_the_same(setting, opts, tmp_path):
    """With or without: the checkpoint is, to the bit, and so are its keys and random state."""
    opts = [*opts, *SETTINGS[setting]]
    trainer, lines = train(opts, tmp_path / "with", 3)
    plain, none = train(opts, tmp_path / "without", 0)
    state, expected = state_of(trainer), state_of(plain)
    assert state.keys() == expected.keys() and not none
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert [line["iteration"] for line in lines] == [2, 5]
    figures = {"staleness", "noise", "non_finite"}
    if setting == "levels":
        figures.add("between_share")
    if setting == "frozen":  # all of it, before the second look
        assert lines.pop().keys() == {"iteration", "bn_monitor/non_finite"}
    for line in lines:
        assert line.keys() == {"iteration", *(f"bn_monitor/{name}" for name in figures)}
        assert line["bn_monitor/noise"] > 0
    events = EventAccumulator(str(tmp_path / "with")).Reload()
    written = [event.step for event in events.Scalars("bn_monitor/noise")]
    assert written == [line["iteration"] for line in lines]


def test_default_period(opts):
    cfg = get_cfg()
    load_config(cfg, BASE, opts, "torchvision")
    assert cfg.TEST.BN_MONITOR == 100
    kinds = [type(hook).__name__ for hook in Trainer(cfg)._hooks]
    assert kinds == ["LossSpikes", "Monitor", "AverageStatistics"]


def train_rank(rank, opts, folder):
    trainer, lines = train(opts, folder, 3)
    return trainer.model.state_dict(), lines


def test_in_two_processes(opts, tmp_path):
    (state, lines), (other, _) = run_ranks(train_rank, 2, opts, tmp_path, timeout=240.0)
    assert [line["iteration"] for line in lines] == [2, 5]
    assert all(0 < line["bn_monitor/rank_spread"] < math.inf for line in lines)
    assert all(torch.equal(value, other[name]) for name, value in state.items())  # averaged
