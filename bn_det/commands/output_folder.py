"""The folder of a run, which is one run's at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from ..files import is_aside, try_lock
from .launch import is_first


@contextmanager
def used_by_one(key: str, folder: str | os.PathLike, machine_rank: int = 0) -> Iterator[None]:
    """Keep other runs out of a folder inside the block, and clear what a killed one left aside.

    The system gives the lock back when the process ends, in whatever way. Where files cannot be
    locked, nothing is kept out.

    Args:
        key: names the folder in messages.
        machine_rank: of several machines of a run the first keeps others out for all.

    Raises:
        InputError: another run is in it, or it cannot be written to.
    """
    if not is_first(machine_rank):
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as e:
        raise InputError(f"{key}: {folder} cannot be written to: {e.strerror}") from e
    with lock:
        with suppress(OSError):  # where files cannot be locked
            if not try_lock(lock):
                lock.seek(0)
                raise InputError(
                    f"{key}: {folder} is in use by {lock.read().strip() or 'another run'}; wait "
                    "for it, or use another folder"
                )
            lock.truncate(0)
            lock.write(f"process {os.getpid()} of {socket.gethostname()}")
            lock.flush()
            for path in (*folder.glob("*.tmp"), *folder.glob("inference/*.tmp")):
                if is_aside(path):
                    path.unlink(missing_ok=True)
        yield
