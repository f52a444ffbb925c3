"""Before processes exchange statistics or samples, they find out that they are at the same place.

Otherwise two ranks that are in different layers would mix what they have, or wait for one that
never comes. So they say where they are, in a process group of their own, over gloo; but not where
each knows it: the ranks have been everywhere together, so all expect the same place next, which is
where they went from the last two the time before. Who goes elsewhere says so, and does not exchange
anything with those who wait there. Ranks that wait write where they are into torch's store, and
look there after the others.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..errors import InputError
from .comm import gather_into, report_disagreement

TIMEOUT = 300.0
"""Seconds that a rank waits for the others, by default."""

_POLL_S = 1.0
_WITHOUT = ("fake", "threaded")
"""Backends whose ranks are in one process, or nowhere."""


_made = itertools.count(1)


class Calls:
    """The calls of a layer, or of something else by which ranks exchange something.

    Attributes:
        name: in the model; may be empty.
        number: how many were made before, for telling those without a name apart; a copy is
            another one. 0 for a layer that is not over processes when it is made.
        count: of calls.
        were_compiled: whether any was a part of a compiled graph, in which ranks do not look after
            each other. A rank that has compiled too often goes on without a graph, and those that
            have one do not meet it.
    """

    were_compiled = False

    def __init__(self, name: str = "", is_counted: bool = True) -> None:
        self.name, self.count = name, 0
        self.number = next(_made) if is_counted else 0

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.number = next(_made) if self.number else 0

    def next(self, kind: str, timeout: float, *values: tuple[str, object]) -> Place:
        """Where a rank is in the next call."""
        self.count += 1
        return Place(self, kind, self.count, "forward pass", values, timeout)


class Place(NamedTuple):
    """Where a rank is when it exchanges something.

    Attributes:
        calls: those of the layer.
        kind: of the layer, for one without a name.
        call: which one.
        stage: of the call.
        values: what has to be the same on all ranks, as pairs of a name and a value.
        timeout: seconds; 0 not to find out anything.
    """

    calls: Calls
    kind: str
    call: int
    stage: str
    values: tuple[tuple[str, object], ...]
    timeout: float

    @property
    def key(self) -> tuple[object, ...]:
        """The same on all ranks that have been everywhere together, and go on so."""
        age = self.calls.count - self.call  # backward passes need not be in the order of calls
        return *self.identity, age, self.values

    @property
    def identity(self) -> tuple[object, ...]:
        """Which layer it is, and the stage of its call."""
        return self.name, None if self.calls.name else self.calls.number, self.stage

    @property
    def name(self) -> str:
        return self.calls.name or self.kind

    def in_full(self) -> str:
        return f"{self} ({', '.join(f'{name} {value}' for name, value in self.values)})"

    def __str__(self) -> str:
        number = "" if self.calls.name else f" number {self.calls.number} (see bn_det.name_layers)"
        return f"{self.name}{number}, call {self.call}, {self.stage}"


TIMEOUTS = (
    "seconds, or 0.0 to wait as long as the process group does, and to take every rank to be in "
    "the same layer"
)
"""What can be waited for, in the words of messages and docs."""


def is_timeout(timeout: float) -> bool:
    """Whether a rank can wait that long."""
    return 0 <= timeout < float("inf")


def check_timeout(name: str, timeout: float) -> None:
    """Raise InputError unless a rank can wait that long."""
    if not is_timeout(timeout):
        raise InputError(f"{name}: {timeout!r} is not accepted; use {TIMEOUTS}")


def meet(place: Place | None, group: dist.ProcessGroup) -> Meeting:
    """Begin to find out whether all ranks of a group are at one place."""
    if place is None or not place.timeout or dist.get_backend(group) in _WITHOUT:
        return Meeting(group)
    if group not in _watches:
        _watches[group] = _Watch(group, place)
    return _RealMeeting(place, _watches[group])


class Meeting:
    """Of ranks that take each other to be at the same place."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def exchange(self, begin: Callable[[dist.ProcessGroup, bool], dist.Work | None]) -> None:
        """Run a collective and wait for it.

        Args:
            begin: begins it in a group, with or without ``async_op``.

        Raises:
            InputError: on every rank, they are in the same layer, but not with the same values.
            RuntimeError: on every rank, they are in different ones; on every rank that has come,
                one has not.
        """
        begin(self._group, False)


_watches: WeakKeyDictionary[dist.ProcessGroup, _Watch] = WeakKeyDictionary()
_num_watches: Counter[tuple[int, ...]] = Counter()
"""Made so far, by their ranks."""


class _Watch:
    """What the ranks of a group find out with where they are.

    Attributes:
        group: the same ranks, over gloo.
        exchanging: the same, in which they exchange what they meet for.
        is_polled: whether the ranks' own exchanges can be looked after, too: on a GPU the host does
            not wait for them.
        number: of meetings so far.
        failure: what has parted the ranks, after which nothing they exchange can be told apart.
        last: where all ranks have been together.
    """

    def __init__(self, group: dist.ProcessGroup, place: Place) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        _num_watches[ranks] += 1
        name = f"bn_det/meeting/{','.join(map(str, ranks))}/{_num_watches[ranks]}"
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self.rank, self.num_ranks = dist.get_rank(group), len(ranks)
        self.is_polled = dist.get_backend(group) == "gloo"
        self.number = 0
        self.last: Place | None = None
        self._route: tuple[object, object] = (None, None)
        self._next: dict[tuple[object, object], object] = {}
        self.failure = ""
        self._assemble(place)
        self.group = _gloo_group(ranks)
        # Not the group that is given, in which a rank may be at a collective of the user's.
        self.exchanging = _gloo_group(ranks) if self.is_polled else group

    def _assemble(self, place: Place) -> None:
        """Wait for all ranks, before there is a group to do it in."""
        begin = time.monotonic()
        self.say_that_this_came(place)
        everyone = [self._key("came", rank) for rank in range(self.num_ranks)]
        while not self._store.check(everyone):
            self._raise_if_told()
            if time.monotonic() - begin > place.timeout:
                self.give_up(place)
            time.sleep(_POLL_S / 50)

    def expects(self, place: Place) -> bool:
        """Whether it is where all ranks went the last time after the last two places."""
        return self.is_polled and self._next.get(self._route) == place.key

    def have_met(self, place: Place) -> None:
        self._next[self._route] = place.key
        self._route = self._route[1], place.key
        self.last = place

    def say_that_this_came(self, place: Place) -> None:
        """To those who wait for it in this meeting."""
        self._store.set(self._key("came", self.rank), place.in_full())

    def look(self, place: Place) -> None:
        """Raise what a rank has told the others, or that one waits elsewhere."""
        self._raise_if_told()
        if any(where != place.in_full() for where in self._came().values()):
            time.sleep(1.5 * _POLL_S)  # whoever has come by now has said so
            self._tell(_said_of(self._came()))

    def give_up(self, place: Place) -> None:
        """Tell those who wait which ranks have not come, and raise it; nothing if all have."""
        time.sleep(1.5 * _POLL_S)
        missing = sorted(set(range(self.num_ranks)) - set(self._came()))
        if missing:
            self._tell(
                f"rank(s) {', '.join(map(str, missing))} of the group did not come to {place} in "
                f"{place.timeout:g} s"
            )

    def said_of_last(self) -> str:
        last = f"; all were last together in {self.last}" if self.last else ""
        return (
            f"{last}. Every rank has to call every layer that normalizes over processes, one "
            "without samples included (timeout: bn_det.name_layers, SOLVER.SYNC_BN_TIMEOUT)"
        )

    def _tell(self, message: str) -> None:
        message += self.said_of_last()
        self._store.compare_set(self._key("failed"), "", message)
        self._raise_if_told()

    def _raise_if_told(self) -> None:
        """Raise what a rank has told the others, once all who wait have read it."""
        if not self._store.check([self._key("failed")]):
            return
        message = self._store.get(self._key("failed")).decode()
        self._store.set(self._key("read", self.rank), "")
        end = time.monotonic() + 5 * _POLL_S
        keys = [self._key("read", rank) for rank in self._came()]
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(_POLL_S / 50)
        self.failure = message
        raise RuntimeError(message)

    def _came(self) -> dict[int, str]:
        """Of the ranks that have said so, where they are."""
        keys = {rank: self._key("came", rank) for rank in range(self.num_ranks)}
        came = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: self._store.get(key).decode() for rank, key in came.items()}

    def _key(self, what: str, rank: int | None = None) -> str:
        return f"{self.number}/{what}" + ("" if rank is None else f"/{rank}")


class _RealMeeting(Meeting):
    """Of ranks that find out where they are. It begins when it is made."""

    def __init__(self, place: Place, watch: _Watch) -> None:
        super().__init__(watch.exchanging)
        self._place, self._watch = place, watch
        if watch.failure:
            raise RuntimeError(f"{place}: the ranks have parted before: {watch.failure}")
        watch.number += 1
        self._work: dist.Work | None = None
        if not watch.expects(place):
            self._mine = torch.tensor(_header(place), dtype=torch.int64, device="cpu")
            self._places = self._mine.new_empty(watch.num_ranks, len(self._mine))
            flat = self._places.view(-1)
            self._work = gather_into(flat, self._mine, watch.group, async_op=True)

    def exchange(self, begin: Callable[[dist.ProcessGroup, bool], dist.Work | None]) -> None:
        if self._work is not None:
            self._wait_for(self._work)
            if not (self._places == self._mine).all():
                self._report_places()
        work = begin(self._group, self._watch.is_polled)
        if self._watch.is_polled and work is not None:
            self._wait_for(work)
        self._watch.have_met(self._place)

    def _wait_for(self, work: dist.Work) -> None:
        begin, is_known = time.monotonic(), False
        while not self._has_ended(work):
            if not is_known:
                self._watch.say_that_this_came(self._place)
                is_known = True
            self._watch.look(self._place)
            if time.monotonic() - begin > self._place.timeout:
                self._watch.give_up(self._place)

    def _has_ended(self, work: dist.Work) -> bool:
        """Wait a little; whether it has ended since."""
        try:
            work.wait(timedelta(seconds=min(_POLL_S, self._place.timeout)))
        except RuntimeError as e:
            if not work.is_completed():
                return False
            # A rank has ended, and with it its connections; the store, too, if it was the first.
            with suppress(dist.DistError):
                self._watch.look(self._place)
            self._watch.failure = f"a rank has ended while this one was in {self._place}: {e}"
            raise RuntimeError(self._watch.failure) from e
        return True

    def _report_places(self) -> None:
        """Raise on every rank what is not the same on all."""
        mine = self._place.name, dict(self._place.values), str(self._place)
        every = [mine] * self._watch.num_ranks
        dist.all_gather_object(every, mine, group=self._watch.group)
        names, values, places = zip(*every, strict=True)
        if len(set(names)) == 1:
            report_disagreement(names[0], list(values))
        raise RuntimeError(f"{_said_of(dict(enumerate(places)))}{self._watch.said_of_last()}")


def _gloo_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """One of ranks that this is one of."""
    # Longer than any of its work is waited for: this file says what is missing, not gloo.
    longest = timedelta(days=1)
    group = dist.new_group(ranks, longest, "gloo", use_local_synchronization=True)
    return cast(dist.ProcessGroup, group)  # a number in ranks that it is not of


def _said_of(places: Mapping[int, str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, place in sorted(places.items()):
        ranks.setdefault(place, []).append(str(rank))
    where = "; ".join(f"rank(s) {', '.join(of)} in {place}" for place, of in ranks.items())
    return f"ranks of the group are in different layers that exchange something: {where}"


@lru_cache(maxsize=4096)
def _digest(what: tuple) -> int:
    return zlib.crc32(repr(what).encode())


def _header(place: Place) -> list[int]:
    return [_digest(place.identity), place.call, _digest(place.values)]
