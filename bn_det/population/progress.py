"""How far a long loop is, in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def with_progress(
    batches: Iterable[T],
    total: int,
    logger: logging.Logger,
    message: str,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """The batches, with a line in the log every five seconds: what is done, and the time left.

    Args:
        total: the size of all batches together.
        message: what is done, with two places for numbers: "Inference done %d/%d".
        size: what a batch counts; 1 by default.
    """
    done, start, last_log = 0, time.monotonic(), time.monotonic()
    for batch in batches:
        yield batch
        done += size(batch)
        if time.monotonic() - last_log > 5:
            last_log = time.monotonic()
            left = timedelta(seconds=int((last_log - start) / done * (total - done)))
            logger.info(f"{message}. ETA=%s", done, total, left)
