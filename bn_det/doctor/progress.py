"""What an examination takes, told before it is paid; and how far it is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

from ..errors import choose
from ..population.progress import with_progress

logger = logging.getLogger(__name__)

T = TypeVar("T")
Advance = Callable[[], Any]
"""What is called after each step."""

WAYS = (None, "tqdm", "log")

_LONGEST = 10**9
"""Seconds that are told."""


class Price(NamedTuple):
    """Of an examination, before it begins.

    Attributes:
        batches: to be looked at, in one forward pass each; 0 where no layer is to be seen.
        held: batches apart; 0 where nothing is evaluated.
        passes: of each of these.
        more: the most that may come to that, of each.
        again: passes of the first batches that may come to that.
        has_score: whether a score (AP) is taken once, and again for each treatment.
        target: batches of the target, in one forward pass each.
        has_target_score: whether a score is taken twice on the target.
    """

    batches: int
    held: int = 0
    passes: int = 0
    more: int = 0
    again: int = 0
    has_score: bool = False
    target: int = 0
    has_target_score: bool = False

    def __str__(self) -> str:
        """In a line."""
        of_target = f", and {self.target} of the target" * (self.target > 0)
        depths = [f"to look: {self.batches} batches{of_target}, a forward pass each"]
        if self.held:
            more = f"up to {self.more} more of each" + f" and {self.again} of the first" * (
                self.again > 0
            )
            depths.append(
                f"to evaluate: {self.held} batches more, {self.passes} passes each; and where "
                f"something is wrong, {more}"
            )
        if self.has_score:
            depths.append("AP: once, and once for each treatment that is tried")
        if self.has_target_score:
            depths.append("AP on the target: twice, if it is of another domain")
        return f"{'; '.join(depths)} (fewer batches, num_iters or --num-iters, cost less)"

    def time(self, of_one: float) -> str:
        """In a line, from the seconds of the first batch."""
        least = self.batches + self.target + self.held * self.passes
        most = least + self.held * self.more + self.again
        words = f"about {_duration(least * of_one)}"
        if most > least:
            words += f", and {_duration(most * of_one)} at most"
        rest = ", beside AP" if self.has_score or self.has_target_score else ""
        return f"the first batch took {of_one:.2g} s: {words}{rest}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=min(max(round(seconds), 1), _LONGEST)))


class Told:
    """Tells a user how far a long work is.

    Args:
        how: one of WAYS: not at all; in bars on stderr; or in the log, every five seconds.

    Raises:
        InputError: it is something else.
    """

    def __init__(self, how: str | None) -> None:
        choose("progress", how, WAYS)
        self.how = how

    @property
    def bars(self) -> str | None:
        """As ``update_bn_stats`` takes it."""
        return "tqdm" if self.how == "tqdm" else None

    def line(self, text: str) -> None:
        if self.how == "log":
            logger.info(text)
        elif self.how == "tqdm":
            from tqdm import tqdm  # only for this: the layers need torch alone

            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Give what is to be called after each step."""
        if self.how == "tqdm":
            from tqdm import tqdm

            with tqdm(total=total, desc=what) as bar:
                yield bar.update
        elif self.how == "log":
            steps = iter(with_progress(repeat(None), total, logger, f"{what}: %d/%d"))
            next(steps)
            yield lambda: next(steps)
        else:
            yield lambda: None

    def passes(self, batches: Iterable[T], price: Price) -> Iterator[T]:
        """The batches, and after the first of them what all of it will take."""
        start = time.monotonic()
        if self.how == "log":
            batches = with_progress(batches, price.batches, logger, "passes: %d/%d")
        for k, batch in enumerate(batches):
            yield batch
            if k == 0:
                self.line(price.time(time.monotonic() - start))


SILENT = Told(None)
