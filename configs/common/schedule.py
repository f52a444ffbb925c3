"""Schedules of the learning rate, for 16 images in a batch. They scale with train.max_iter."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler


def _multi_step(first, second, last):
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=[first, second, last]
        ),
        warmup_factor=1.0 / 1000,
        warmup_length=1000 / last,
        warmup_method="linear",
    )


lr_multiplier_1x = _multi_step(60000, 80000, 90000)
lr_multiplier_3x = _multi_step(210000, 250000, 270000)
