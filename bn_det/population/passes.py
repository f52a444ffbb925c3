"""Forward passes of a model in training mode that are no step of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

_SURROUNDINGS: list[Callable[[], AbstractContextManager]] = []


def surround_passes(context: Callable[[], AbstractContextManager]) -> None:
    """Have such passes run inside a context that a host's models need."""
    _SURROUNDINGS.append(context)


@contextmanager
def surroundings() -> Iterator[None]:
    """What such passes run in."""
    with ExitStack() as stack:
        for surrounding in _SURROUNDINGS:
            stack.enter_context(surrounding())
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6
            # What is compiled would be compiled anew, for the layers as they are in the passes.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
