"""The mode of a model whose statistics are adapted to the images of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layers.kept import kept_in_evaluation
from ..layers.kinds import batch_norms


@contextmanager
def as_in_a_test(model: nn.Module) -> Iterator[None]:
    """Inside the block a model is in evaluation mode, and its BatchNorm alone in training mode.

    Detectors then detect, and need no targets. What the model's own train() keeps in evaluation
    mode stays there.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in set(batch_norms(model)) - kept_in_evaluation(model):
            layer.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
