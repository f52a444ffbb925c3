"""How the calls of a layer in a pass differ: those of feature levels that share statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..doctor.shares import Share, share_of
from ..layers import BatchNorm2d
from ..layers.batch import Batch
from ..layers.ema import in_backward_pass
from ..layers.freeze import is_frozen
from ..layers.kinds import unwrapped
from ..layers.moments import Moments
from ..population.observation import PopulationLayer


class CallWatch:
    """Takes the moments of each call of some layers, while it watches.

    A layer computes what it does otherwise, to the bit. What activation checkpointing repeats is
    not looked at.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._passes: dict[str, list[list[Moments]]] = {}
        self._num_passes = 0

    def start(self, model: nn.Module, places: Iterable[PopulationLayer]) -> None:
        """Watch until :meth:`stop`. Nothing in a compiled model, which would be compiled anew.

        Args:
            model: as it is called, whatever is around it.
        """
        if any(map(_is_compiled, model.modules())):
            return
        self._handles = [unwrapped(model).register_forward_pre_hook(self._begin_pass)]
        for place in places:
            if is_frozen(place.owner):  # which does without moments
                continue
            if isinstance(place.owner, BatchNorm2d):
                handle = place.owner.register_observer(partial(self._observe, place))
            else:
                handle = place.module.register_forward_pre_hook(partial(self._take_input, place))
            self._handles.append(handle)

    def stop(self) -> None:
        """The layers are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._num_passes += 1

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

    def _observe(
        self, place: PopulationLayer, population: _BatchNorm, batches: Sequence[Batch]
    ) -> None:
        seen = [batch.moments for batch in batches if batch.size > 0]
        if population is place.module and seen and not in_backward_pass():
            self._add(place, Moments.merge(seen))

    def _take_input(self, place: PopulationLayer, module: nn.Module, inputs: tuple) -> None:
        if module.training and inputs[0].numel() and not in_backward_pass():
            self._add(place, Moments.of(inputs[0]))

    def _add(self, place: PopulationLayer, moments: Moments) -> None:
        passes = self._passes.setdefault(place.name, [])
        passes += [[] for _ in range(self._num_passes + 1 - len(passes))]
        passes[self._num_passes].append(moments)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or bool(module._compiled_call_impl)
