"""Passes that leave a model as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import InputError
from ..layers.kinds import STATISTICS, check_module, is_batch_norm, unwrapped
from .passes import surroundings
from .snapshot import Snapshot, same_random_state


@contextmanager
def unchanged_statistics(model: nn.Module) -> Iterator[None]:
    """Check that a block leaves the population statistics of a model as they are.

    For code that only looks: a probe, a visualization, an evaluation of somebody else's. Whatever
    has moved is put back at the end of the block, also after an error.

    Raises:
        InputError: after the block, if statistics have moved; it names the layers.
    """
    check_module("model", model)
    held = [
        (f"{name}.{key}" if name else key, layer._buffers, key, buffer, buffer.clone())
        for name, layer in model.named_modules()
        if is_batch_norm(layer)
        for key in STATISTICS
        if (buffer := layer._buffers.get(key)) is not None and not is_lazy(buffer)
    ]
    moved = []
    try:
        yield
    finally:
        for name, buffers, key, buffer, value in held:
            if buffers.get(key) is not buffer or not _is_same(buffer, value):
                moved.append(name)
                buffers[key] = buffer
                with torch.no_grad():
                    buffer.copy_(value)
    if moved:
        names = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        raise InputError(
            f"unchanged_statistics: {names} moved inside the block, and are put back: a forward "
            "pass in training mode moves them; call eval() before it"
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def evaluated_losses(model: nn.Module) -> Iterator[None]:
    """Inside the block a detector computes its losses, normalizing as in evaluation.

        with torch.no_grad(), bn_det.evaluated_losses(model):
            losses = model(images, targets)

    A detector of Detectron2 or torchvision has losses in training mode alone, in which BatchNorm
    normalizes by the batch and takes validation images into its statistics. Here all of it is in
    training mode but BatchNorm and dropout of any kind (stochastic depth, DropPath). After the
    block, and after an error in it, everything is as it was: modes, statistics, whatever else the
    model counts, and random states.
    """
    model = unwrapped(model)
    with put_back(model):
        model.train()
        for module in model.modules():
            if is_batch_norm(module) or _has_statistics(module) or _is_random(module):
                module.eval()
        yield


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Leave a model, whatever it counts, and random states as they were before the block."""
    with ExitStack() as stack:
        stack.enter_context(surroundings())
        tensors = (*model.parameters(), *model.buffers())
        stack.enter_context(same_random_state({t.device for t in tensors}))
        stack.callback(Snapshot(model).restore)
        yield


def _has_statistics(module: nn.Module) -> bool:
    """Whether a module has some, of whatever class it is, scripted ones among them."""
    return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))


def _is_random(module: nn.Module) -> bool:
    """Whether a module draws in training: dropout, of torch's or of another's class."""
    known = (nn.modules.dropout._DropoutNd, nn.RReLU)
    words = ("Dropout", "DropPath", "DropBlock", "StochasticDepth")
    return isinstance(module, known) or any(word in type(module).__name__ for word in words)
