"""SGD, and what happens around its steps.

tools/lazyconfig_train_net.py takes no hooks. They are in the optimizer (bn_det.d2.lazy), by their
names: optimizer.hooks=[precise_bn,average]. Where the optimizer is to be another, change its kind,
and set what that does not take to None: optimizer.kind=torch.optim.AdamW optimizer.momentum=null.
In a node of your own they are missing.
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.solver.build import get_default_optimizer_params

from bn_det.d2 import (
    AverageStatistics,
    FreezeBN,
    LossSpikes,
    Monitor,
    PreciseBN,
    RenormSchedule,
    TuneBN,
    VirtualBatch,
)
from bn_det.d2.lazy import build_optimizer
from bn_det.layers.renorm import RenormLimits


def _train_batches(total_batch_size, num_workers):
    """Batches as in training, of their own."""
    return L(build_detection_train_loader)(
        dataset="${dataloader.train.dataset}",
        mapper="${dataloader.train.mapper}",
        total_batch_size=total_batch_size,
        num_workers=num_workers,
    )


_PERIODS = ["${train.eval_period}", "${train.checkpointer.period}"]

optimizer = L(build_optimizer)(
    params=L(get_default_optimizer_params)(
        model=None,  # the tool sets it
        weight_decay_norm=0.0,
    ),
    model="${.params.model}",
    max_iter="${train.max_iter}",
    kind="torch.optim.SGD",
    lr=0.02,
    momentum=0.9,
    weight_decay=0.0001,
    agc=None,  # or dict(clip_factor=0.01, eps=0.001)
    accumulate=1,
    # What runs of the following, in this order.
    hooks=["loss_spikes", "monitor", "average"],
    hook_nodes=dict(
        loss_spikes=L(LossSpikes)(output_dir="${train.output_dir}"),
        renorm=L(RenormSchedule)(
            limits=L(RenormLimits)(r_max=3.0, d_max=5.0),
            warmup_iters=5000,
            r_max_iter=40000,
            d_max_iter=25000,
        ),
        freeze_bn=L(FreezeBN)(
            iteration=0,  # to be set where it runs
            affine=False,
            precise="${..precise_bn}",
            modules=None,  # names or patterns of names of modules; None for all
        ),
        tune_bn=L(TuneBN)(iteration="${..freeze_bn.iteration}"),
        virtual_batch=L(VirtualBatch)(
            model="${...params.model}",
            data_loader=_train_batches(16, "${dataloader.train.num_workers}"),
        ),
        monitor=L(Monitor)(period=100),
        precise_bn=L(PreciseBN)(
            periods=_PERIODS,
            model="${...params.model}",
            # no processes of its own: it rests nearly all the time
            data_loader=_train_batches("${dataloader.train.total_batch_size}", 0),
            num_iter=200,
            tolerance=0.0,
            estimator="population_variance",
        ),
        average=L(AverageStatistics)(periods=_PERIODS),
    ),
)
