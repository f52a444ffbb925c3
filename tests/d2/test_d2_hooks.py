"""Our hooks in a loop of Detectron2's, as a project registers them."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import subprocess
import sys
import textwrap

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch import nn

from bn_det.d2 import AverageStatistics, PreciseBN
from bn_det.errors import InputError


class Trainer(TrainerBase):
    """The loop alone."""

    def __init__(self):
        super().__init__()
        self.model, self.steps = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 0

    def run_step(self):
        self.steps += 1


def make_precise_bn(model):
    return PreciseBN([1], model, [torch.randn(2, 3, 4, 4)] * 2, num_iter=2)


@pytest.mark.parametrize("ours", [make_precise_bn, lambda _: AverageStatistics([1])])
@pytest.mark.parametrize(
    "other",
    [lambda _: EvalHook(1, dict), lambda m: PeriodicCheckpointer(DetectionCheckpointer(m), 1)],
)
def test_a_hook_in_the_wrong_place(ours, other):
    """It says so before the first step; in the right one it does its work."""
    trainer = Trainer()
    first, second = other(trainer.model), ours(trainer.model)
    trainer.register_hooks([first, second])
    names = f"{type(second).__name__} is registered after {type(first).__name__}"
    with pytest.raises(InputError, match=names):
        trainer.train(0, 1)
    assert trainer.steps == 0
    trainer = Trainer()
    trainer.register_hooks([ours(trainer.model), other(trainer.model)])
    trainer.train(0, 1)
    assert trainer.steps == 1
    assert trainer.model[1].running_mean.any() == (ours is make_precise_bn)


def test_the_report_is_seen_in_a_project_without_a_log_of_ours():
    """Nothing but the loop and the hook, in a process of its own."""
    code = """
        import torch
        from detectron2.engine import TrainerBase
        from torch import nn
        from bn_det.d2 import PreciseBN
        class Trainer(TrainerBase):
            run_step = lambda self: None
        trainer = Trainer()
        trainer.model = nn.Sequential(nn.BatchNorm2d(3))
        batches = [torch.randn(2, 3, 4, 4)] * 2
        trainer.register_hooks([PreciseBN([1], trainer.model, batches, num_iter=2)])
        trainer.train(0, 1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Furthest from the new ones: 0 (mean by" in done.stdout
