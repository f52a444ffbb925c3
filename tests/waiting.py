"""Wait for what another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = 120) -> T:
    """What ``condition`` returns, as soon as that is true.

    Raises:
        TimeoutError: it was not, for so long.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came within {seconds:g} s")
        time.sleep(0.02)
    return value
