"""How far a long loop is, in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Generic, TypeVar

T = TypeVar("T")


class with_progress(Generic[T]):
    """The batches, with a line in the log every five seconds: what is done, and the time left.

    As many as there are, if the batches say so.

    Args:
        total: the size of all batches together.
        message: what is done, with two places for numbers: "Inference done %d/%d".
        size: what a batch counts; 1 by default.
    """

    def __init__(
        self,
        batches: Iterable[T],
        total: int,
        logger: logging.Logger,
        message: str,
        size: Callable[[T], int] = lambda _: 1,
    ) -> None:
        self.batches, self.total, self.size = batches, total, size
        self.logger, self.message = logger, message

    def __len__(self) -> int:
        if not isinstance(self.batches, Sized):
            raise TypeError(f"{type(self.batches).__name__} has no len()")
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        done, start, last_log = 0, time.monotonic(), time.monotonic()
        for batch in self.batches:
            yield batch
            done += self.size(batch)
            if time.monotonic() - last_log > 5:
                last_log = time.monotonic()
                left = timedelta(seconds=int((last_log - start) / done * (self.total - done)))
                self.logger.info(f"{self.message}. ETA=%s", done, self.total, left)
