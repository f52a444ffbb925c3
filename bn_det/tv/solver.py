"""Optimizer and learning rate schedule from Detectron2's SOLVER keys."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from ..config.training import clipping_of
from ..errors import InputError

_NORM_TYPES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> SGD:
    """SGD with momentum; parameters of normalization layers have a weight decay of their own."""
    # Each once: layers for each level may share theirs, and SGD would step as often as it stands.
    norms: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for module in model.modules():
        group = norms if isinstance(module, _NORM_TYPES) else others
        group.update((p, None) for p in module.parameters(recurse=False) if p.requires_grad)
    groups = [
        {"params": list(others), "weight_decay": cfg.SOLVER.WEIGHT_DECAY},
        {"params": list(norms), "weight_decay": cfg.SOLVER.WEIGHT_DECAY_NORM},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = SGD(groups, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM)
    if cfg.SOLVER.AGC.ENABLED:
        clipping_of(cfg, model).attach(optimizer)
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: SGD) -> LambdaLR:
    """The schedule that LR_SCHEDULER_NAME means in Detectron2, warm-up included."""
    multiplier = _multiplier(cfg)
    max_iter = cfg.SOLVER.MAX_ITER
    return LambdaLR(optimizer, lambda i: multiplier(i / max_iter))


def _multiplier(cfg: CfgNode) -> ParamScheduler:
    """The factor of BASE_LR as a function of the part of training that is done."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        main = CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    else:
        steps = [s for s in solver.STEPS if s <= solver.MAX_ITER]
        if steps != sorted(set(steps)):
            raise InputError(f"SOLVER.STEPS: {solver.STEPS!r} is not accepted; use rising numbers")
        main = MultiStepParamScheduler(
            [solver.GAMMA**k for k in range(len(steps) + 1)],
            milestones=steps,
            num_updates=solver.MAX_ITER,
        )
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    return CompositeParamScheduler(
        [LinearParamScheduler(solver.WARMUP_FACTOR * main(0), main(warmup)), main],
        interval_scaling=["rescaled", "fixed"],
        lengths=[warmup, 1 - warmup],
    )
