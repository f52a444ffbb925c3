"""The calls of layers in the passes of a step: how many, and how those in a pass differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..doctor.shares import Share, share_of
from ..layers import BatchNorm2d
from ..layers.batch import Batch
from ..layers.ema import in_backward_pass
from ..layers.freeze import is_frozen
from ..layers.kinds import unwrapped
from ..layers.moments import Moments
from ..layers.types import AnyBatchNorm
from ..population.observation import PopulationLayer


class Calls(NamedTuple):
    """In a step, by whether gradients are enabled around the pass of the model.

    Attributes:
        passes: of the model.
        of_layers: by name.
    """

    passes: Counter[bool]
    of_layers: Counter[tuple[str, bool]]


class CallWatch:
    """Takes the moments of each call of some layers, while it watches.

    A layer computes what it does otherwise, to the bit. What activation checkpointing repeats is
    not looked at.
    """

    def __init__(self) -> None:
        self._calls = Calls(Counter(), Counter())
        self._handles: list[RemovableHandle] = []
        self._passes: dict[str, list[list[Moments]]] = {}
        self._num_passes = 0
        self._has_gradients = True

    def start(self, model: nn.Module, places: Iterable[PopulationLayer]) -> None:
        """Watch until :meth:`stop`. Nothing in a compiled model, which would be compiled anew.

        Args:
            model: as it is called, whatever is around it.
        """
        if is_compiled(model):
            return
        self._calls, self._has_gradients = Calls(Counter(), Counter()), True
        self._handles = [unwrapped(model).register_forward_pre_hook(self._begin_pass)]
        for place in places:
            if is_frozen(place.owner):  # which does without moments
                continue
            if isinstance(place.owner, BatchNorm2d):
                handle = place.owner.register_observer(partial(self._observe, place))
            else:
                handle = place.module.register_forward_pre_hook(partial(self._take_input, place))
            self._handles.append(handle)

    def stop(self) -> Calls | None:
        """Leave the layers as they were; the calls since the start, or None without one."""
        calls = self._calls if self._handles else None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._num_passes += 1
        return calls

    def shares(self) -> dict[str, Share]:
        """Of each layer that every pass has called as often, more than once."""
        found = {}
        for name, passes in self._passes.items():
            calls = [of_pass for of_pass in passes if of_pass]
            numbers = {len(of_pass) for of_pass in calls}
            if len(calls) > 1 and len(numbers) == 1 and min(numbers) > 1:
                found[name] = share_of(calls)
        return found

    def _begin_pass(self, *_: Any) -> None:
        if not in_backward_pass():
            self._num_passes += 1
            # Not at the layers, which checkpointing may call without, in a pass that has some.
            self._has_gradients = torch.is_grad_enabled()
            self._calls.passes[self._has_gradients] += 1

    def _observe(
        self, place: PopulationLayer, population: AnyBatchNorm, batches: Sequence[Batch]
    ) -> None:
        seen = [batch.moments for batch in batches if batch.size > 0]
        if population is place.module and seen and not in_backward_pass():
            self._count(place)
            self._add(place, Moments.merge(seen))

    def _take_input(self, place: PopulationLayer, module: nn.Module, inputs: tuple) -> None:
        if not module.training or in_backward_pass():
            return
        self._count(place)  # an empty one, too, as torch does
        if inputs[0].numel():
            self._add(place, Moments.of(inputs[0]))

    def _count(self, place: PopulationLayer) -> None:
        self._calls.of_layers[place.name, self._has_gradients] += 1

    def _add(self, place: PopulationLayer, moments: Moments) -> None:
        passes = self._passes.setdefault(place.name, [])
        passes += [[] for _ in range(self._num_passes + 1 - len(passes))]
        passes[self._num_passes].append(moments)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is, or a part of it."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or bool(module._compiled_call_impl)
        for module in model.modules()
    )
