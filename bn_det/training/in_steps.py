"""How often EMAs move in steps and between them, in which modes, and by how many samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..doctor.from_training import Updates
from ..layers.domain_batch_norm import DomainBatchNorm2d
from ..layers.freeze import is_frozen
from ..layers.kinds import unwrapped
from ..population.observation import PopulationLayer
from .between_calls import Calls, is_compiled
from .movement import Snapshot, updates_of


class SampleWatch:
    """Takes the number of samples that layers are called with, and of passes with gradients.

    Attributes:
        called: by the name of each place of statistics in training mode, the layer that is called
            and the most samples of a call.
        passes: of the model, with gradients.
    """

    def __init__(self) -> None:
        self.called: dict[str, tuple[nn.Module, float]] = {}
        self.passes = 0
        self._handles: list[RemovableHandle] = []

    def start(self, model: nn.Module, places: Sequence[PopulationLayer]) -> None:
        """Watch until :meth:`stop`. Nothing in a compiled model, which would be compiled anew."""
        if is_compiled(model):
            return
        self._handles = [unwrapped(model).register_forward_pre_hook(self._begin_pass)]
        for place in places:
            take = partial(self._take, place)
            handle = place.owner.register_forward_pre_hook(take, with_kwargs=True)
            self._handles.append(handle)

    def stop(self) -> None:
        """The layers are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin_pass(self, *_: Any) -> None:
        self.passes += torch.is_grad_enabled()

    def _take(
        self, place: PopulationLayer, owner: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else next(v for name, v in kwargs.items() if name != "groups")
        sizes = owner.num_samples(x) if isinstance(owner, DomainBatchNorm2d) else [len(x)]
        most = max(sizes[k] for k in place.domains)
        # Extra images (virtual_batch) are in a normalization batch, too.
        if owner.training and not getattr(owner, "_extensions", None):
            _, before = self.called.get(place.name, (owner, 0))
            self.called[place.name] = owner, max(before, most)


def updates_in_steps(
    places: Sequence[PopulationLayer],
    befores: Sequence[Snapshot],
    afters: Sequence[Snapshot],
    calls: Sequence[Calls | None],
) -> dict[str, Updates]:
    """Of the places that were updated several times in a step that was watched, the most."""
    watched = {k: of for k, of in enumerate(calls) if of is not None}
    if not watched:
        return {}
    updates = updates_of([befores[k] for k in watched], [afters[k] for k in watched]).tolist()
    found: dict[str, Updates] = {}
    for of_step, numbers in zip(watched.values(), updates, strict=True):
        for place, number in zip(places, numbers, strict=True):
            if number > 1 and number > getattr(found.get(place.name), "number", 1):
                found[place.name] = Updates(
                    getattr(place.module, "momentum", None),
                    number,
                    of_step.of_layers[place.name, True],
                    of_step.of_layers[place.name, False],
                    of_step.passes[True],
                )
    return found


class Look(NamedTuple):
    """At some successive steps of a training.

    Attributes:
        first, last: numbers of the steps.
        counts: by the names of places, the batches tracked before the first and after the last.
        a_step: of these, in each step; not of places whose steps differ.
        between: those between these steps.
        modes: "moving", or "still" where a layer is in evaluation mode and not frozen.
    """

    first: int
    last: int
    counts: dict[str, tuple[int, int]]
    a_step: dict[str, int]
    between: dict[str, int]
    modes: dict[str, str]

    @classmethod
    def at(
        cls,
        last: int,
        places: Sequence[PopulationLayer],
        befores: Sequence[Snapshot],
        afters: Sequence[Snapshot],
        has_moved: Sequence[bool],
    ) -> Look:
        """After the last of the steps.

        Args:
            has_moved: of each place, whether its statistics have, in some step.
        """
        names = [place.name for place in places]
        steps = updates_of(befores, afters)
        between = updates_of(afters[:-1], befores[1:]).sum(0) if len(afters) > 1 else 0 * steps[0]
        ends = torch.stack([befores[0].counts, afters[-1].counts], 1).tolist()
        rows = zip(names, steps.amin(0).tolist(), steps.amax(0).tolist(), strict=True)
        modes = [_mode(place, moved) for place, moved in zip(places, has_moved, strict=True)]
        return cls(
            last - len(befores) + 1,
            last,
            dict(zip(names, map(tuple, ends), strict=True)),
            {name: least for name, least, most in rows if least == most},
            dict(zip(names, between.tolist(), strict=True)),
            {name: mode for name, mode in zip(names, modes, strict=True) if mode},
        )

    def extra_since(self, earlier: Look | None) -> dict[str, int]:
        """By the names of places, the batches that no step belongs to.

        Of places that each step of both looks has updated as often; and only if there are such
        batches in all of these. In one of some an average over ranks may have moved the counter.
        """
        found = {}
        for name, number in self.a_step.items():
            extra = self.between[name]
            if earlier is not None and earlier.a_step.get(name) == number:
                since = self.counts[name][0] - earlier.counts[name][1]
                extra += since - number * (self.first - earlier.last - 1)
            if number > 0:
                found[name] = extra
        return found if all(extra > 0 for extra in found.values()) else {}


def _mode(place: PopulationLayer, has_moved: bool) -> str:
    if has_moved:
        return "moving"
    return "" if place.owner.training or is_frozen(place.owner) else "still"
