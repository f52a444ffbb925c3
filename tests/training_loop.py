"""A small training loop that calls hooks as both hosts do, and models for it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_det import BatchNorm2d, DomainBatchNorm2d, freeze
from bn_det.training import accumulate


def warned():
    """What is warned of from now on in this process, as a list that grows."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("bn_det").addHandler(handler)
    return messages


def make_batch(step, size=6):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))


class Levels(nn.Module):
    """Feature levels, of means that differ, which a layer is called with one after the other."""

    def __init__(self, norm, gap=1.0):
        super().__init__()
        self.conv, self.norm, self.gap = nn.Conv2d(3, 4, 1), norm, gap

    def forward(self, x):
        x = self.conv(x)
        xs = [x + 2 * self.gap, F.avg_pool2d(x, 2) * 1.5 - self.gap, x[:, :, ::2, ::2]]
        takes_list = isinstance(self.norm, DomainBatchNorm2d)
        ys = self.norm(xs) if takes_list else [self.norm(of_level) for of_level in xs]
        return sum(y.relu().mean((2, 3), keepdim=True) for y in ys)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def convolutions(norm, kind=nn.Sequential):
    return kind(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1), norm(2))


def shared_levels(**choices):
    return Levels(DomainBatchNorm2d(4, 3, population="shared", **choices))


def timm_model():
    return convolutions(pytest.importorskip("timm.layers").BatchNormAct2d)


def half_frozen():
    model = convolutions(BatchNorm2d)
    freeze(model, ["1"])
    return model


MODELS = {
    "torch": lambda: convolutions(nn.BatchNorm2d),
    "ours": lambda: convolutions(BatchNorm2d),
    "sync": lambda: convolutions(lambda c: BatchNorm2d(c, group="world")),
    "timm": timm_model,
    "random ghosts": lambda: convolutions(
        lambda c: BatchNorm2d(c, ghost_size=2, ghost_order="random")
    ),
    "renorm": lambda: convolutions(lambda c: BatchNorm2d(c, renorm=(2.0, 1.0))),
    "population": lambda: convolutions(lambda c: BatchNorm2d(c, train_statistics="population")),
    "cumulative": lambda: convolutions(lambda c: nn.BatchNorm2d(c, momentum=None)),
    "half frozen": half_frozen,
    "checkpointed": lambda: convolutions(nn.BatchNorm2d, Checkpointed),
    "ours, checkpointed": lambda: convolutions(BatchNorm2d, Checkpointed),
    "levels of torch": lambda: Levels(nn.BatchNorm2d(4)),
    "levels of ours": lambda: Levels(BatchNorm2d(4)),
    "levels in a list": shared_levels,
    "levels together": lambda: shared_levels(statistics="shared"),
    "levels, renorm": lambda: shared_levels(renorm=(2.0, 1.0)),
    "levels, population": lambda: shared_levels(train_statistics="population"),
}


class Trainer:
    """SGD, which calls hooks as both hosts do."""

    def __init__(self, model, max_iter, *hooks, lr=0.01, num_batches=1):
        self.model, self.max_iter, self.iter, self.hooks = model, max_iter, 0, hooks
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.5)
        self.num_batches, self.losses, self.scalars = num_batches, [], []
        self.dtype, self.batch = None, make_batch

    def put_scalars(self, scalars):
        self.scalars.append((self.iter, scalars))

    def train(self):
        self.model.train()
        for hook in self.hooks:
            hook.trainer = self
            hook.before_train()
        try:
            while self.iter < self.max_iter:
                self.step()
                self.iter += 1
        finally:
            for hook in self.hooks:
                hook.after_train()
        return self

    def step(self):
        for hook in self.hooks:
            hook.before_step()
        batches = [self.batch(self.iter + 1000 * k) for k in range(self.num_batches)]
        self.optimizer.zero_grad()
        losses = accumulate(self.model, batches, self.losses_of)
        self.losses.append(losses["loss"].item())
        self.optimizer.step()
        for hook in self.hooks:
            hook.after_step()

    def losses_of(self, model, x):
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return {"loss": (model(x).float() - x[:, :1, :1, :1]).square().mean()}


def hooks_of(model):
    """How much is registered with modules."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_observers"
    return [
        [len(vars(m).get(k, ())) for k in kinds] + ["forward" in vars(m)] for m in model.modules()
    ]


def still(model, max_iter, *hooks, **how):
    """A training whose weights stay as they are."""
    return Trainer(model, max_iter, *hooks, lr=0.0, **how)
