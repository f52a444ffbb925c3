"""What a model is made of, kept, to be put back after something has run it."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Snapshot:
    """A model's parameters, buffers, gradients, what learns, its modules' class and attributes.

    Attributes include hooks, training flags, and what is in no state dict, such as the moving
    average that Detectron2's RetinaNet divides its loss by. Tensors, modules, and Python's own
    containers are followed to any depth; other objects are kept by reference, as they are. Of a
    scripted module it is parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._leaves: list[tuple[Tensor, bool, Tensor | None]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        seen: dict[int, Any] = {}  # it also keeps what it has seen, and its id, alive
        pending: list[Any] = [model]
        while pending:
            value = pending.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                pending.extend(self._keep(value))

    def restore_attributes(self) -> None:
        """Undo what was assigned, put into containers and taken out; not the values of tensors."""
        for module, cls in self._classes:
            if type(module) is not cls:
                module.__class__ = cls
        for container, content in self._containers:
            if container or content:
                _restore_container(container, content)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything."""
        self.restore_attributes()
        for tensor, content in self._tensors:
            # Writing makes a graph that has saved the tensor invalid: only where it has changed.
            if tensor.is_sparse or not torch.equal(tensor, content):
                tensor.copy_(content)
        for tensor, learns, gradient in self._leaves:
            if not tensor.is_leaf:  # a buffer that a pass with gradients has written into
                continue
            if tensor.requires_grad != learns:
                tensor.requires_grad_(learns)
            if tensor.grad is not gradient:
                tensor.grad = gradient

    def _keep(self, value: Any) -> Iterable[Any]:
        """Note one value; what it holds."""
        if isinstance(value, Tensor) and not is_lazy(value):
            self._tensors.append((value, value.detach().clone()))
            if value.is_leaf:
                self._leaves.append((value, value.requires_grad, value.grad))
                return [value.grad]
        elif isinstance(value, torch.jit.ScriptModule):
            return [*value.parameters(), *value.buffers()]
        elif isinstance(value, nn.Module):
            self._classes.append((value, type(value)))
            return [vars(value)]
        elif isinstance(value, dict):
            self._containers.append((value, dict(value)))
            return value.values()
        elif isinstance(value, (list, deque, set)):
            self._containers.append((value, list(value)))
            return value
        elif isinstance(value, tuple):
            return value
        return ()


def _restore_container(container: Any, content: Any) -> None:
    """Only where something is other than it was, and so that no moment leaves a module empty."""
    if isinstance(container, dict):
        for key, value in content.items():
            if key not in container or container[key] is not value:
                container[key] = value
        for key in [k for k in container if k not in content]:
            del container[key]
    elif isinstance(container, set):
        container.intersection_update(content)
        container.update(content)
    elif len(container) != len(content) or any(
        a is not b for a, b in zip(container, content, strict=True)
    ):
        container.clear()
        container.extend(content)


@contextmanager
def same_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were before the block.

    Args:
        devices: whose generators are meant beside the CPU's.
    """
    # NumPy is not needed here, and has no state where nothing has imported it.
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    cuda = {d for d in devices if d.type == "cuda"}
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)
