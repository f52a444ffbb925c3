"""The batches of an examination, each as its loader gave it whatever is done with it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import takewhile, tee
from typing import Any

from ..errors import InputError, reason_of


class Images:
    """Batches, of which some are held apart.

    Attributes:
        rest: that are looked at.
    """

    def __init__(self, batches: Iterable[Any], evaluate: bool, twice: bool) -> None:
        self._held: list[Any] = []
        self.rest = iter(batches)
        self._again: Iterator[Any] = iter(())
        if evaluate:
            self.rest = _others(map(copied, self.rest), self._held)
        if twice:
            kept, self._again = tee(self.rest)
            self.rest = map(copied, kept)

    def again(self) -> Iterator[Any]:
        """Those that are looked at once more, where they are asked to be held."""
        return map(copied, copy.copy(self._again))  # a copy of tee's begins where it is

    def held(self, number: int) -> list[Any]:
        """So many of those apart; the passes take none where all layers are frozen."""
        deque(takewhile(lambda _: len(self._held) < number, self.rest), maxlen=0)
        return self._held


def copied(batch: Any) -> Any:
    """A batch that neither its loader nor a model changes, as one does that normalizes in place.

    Raises:
        InputError: it can be used but once.
    """
    try:
        return copy.deepcopy(batch)
    except Exception as e:
        raise InputError(
            f"batches: to evaluate, each is used several times, and a {type(batch).__name__} is "
            f"given of which no copy can be made: {reason_of(e)}"
        ) from e


def _others(batches: Iterable[Any], held: list[Any]) -> Iterator[Any]:
    """Batches but for each third one, which is put into ``held``, apart from the others.

    Raises:
        InputError: at their end, if fewer than two are held.
    """
    number = 0
    for number, batch in enumerate(batches, 1):
        if number % 3 == 0:
            held.append(batch)
        else:
            yield batch
    if len(held) < 2:
        raise InputError(
            f"batches: {number} are too few to evaluate, which takes 6 at least, as each third is "
            "held apart"
        )
