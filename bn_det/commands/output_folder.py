"""The folder of a run, which is one run's at a time."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import InputError, path_of
from ..files import check_regular, is_aside, is_json, try_lock, within_memory
from .launch import FULL, is_first


def written_in(key: str, folder: str, fn: Callable[..., None], *args: Any) -> None:
    """Call ``fn(*args)``, which writes into a folder, and name that where writing fails.

    Raises:
        InputError: it did, as the disk is full or the like.
    """
    threading.excepthook = _of_thread
    try:
        fn(*args)
    except OSError as e:
        if e.errno not in FULL:
            raise
        path = folder if e.filename is None else path_of(e)
        raise InputError(f"{key}: {path} cannot be written to: {e.strerror}") from e


_excepthook = threading.excepthook


def _of_thread(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread, whose error its caller raises, too.
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in FULL):
        _excepthook(args)


def end_logs_that_fail(names: Iterable[str]) -> None:
    """Have a log that cannot be written to its file say so once, and end; the run goes on.

    By itself logging prints a traceback for each of its lines.

    Args:
        names: of loggers.
    """
    others = None, sys.stdout, sys.stderr
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream not in others:
                vars(handler)["handleError"] = partial(_end_log, handler)


_SETTINGS = (
    *("Environment info", "Command line arguments", "Contents of args.config_file"),
    *("Running with full config", "Model:"),
)
"""How either host begins to log what a command is run with, hundreds of lines."""


def show_no_settings(names: Iterable[str]) -> None:
    """Have what a command is run with be in its log's file alone, where it hides a short result.

    Args:
        names: of loggers.
    """
    shown = sys.stdout, sys.stderr
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in shown:
                handler.addFilter(lambda record: not str(record.msg).startswith(_SETTINGS))


def _end_log(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    error, stream = sys.exc_info()[1], handler.stream
    if isinstance(error, OSError):
        print(f"{stream.name}: ends here: {error.strerror}", file=sys.stderr)
        with suppress(OSError):  # what it holds would fail again when the process ends
            stream.close()
    elif not stream.closed:  # of Detectron2's loggers, which share it
        logging.Handler.handleError(handler, record)
        return
    handler.setLevel(logging.CRITICAL + 1)


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
        _refuse_pipes(folder)
        # Unbuffered: what a full disk does not take would fail again when it is closed.
        lock = open(folder / ".lock", "ab+", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise InputError(f"{key}: {folder} cannot be written to: {e.strerror}") from e
    with lock:
        with suppress(OSError):  # where files cannot be locked
            _refuse_locked(key, folder, lock)
            lock.truncate(0)
            for path in (*folder.glob("*.tmp"), *folder.glob("inference/**/*.tmp")):
                if is_aside(path):
                    path.unlink(missing_ok=True)
            _end_last_line(folder / "metrics.json")
            lock.write(f"process {os.getpid()} of {socket.gethostname()}".encode())
        _held.add(os.path.realpath(folder))
        try:
            yield
        finally:
            _held.discard(os.path.realpath(folder))


_held: set[str] = set()
"""Folders that this process has, by their real paths."""


def refuse_in_use(key: str, folder: Path) -> None:
    """Raise InputError for a folder that another process has for a run (:func:`used_by_one`)."""
    # To close a file gives back the lock on it that the process has.
    if os.path.realpath(folder) in _held:
        return
    try:
        lock = open(folder / ".lock", "rb+")  # noqa: SIM115
    except OSError:  # no run has been there, or none that can be seen
        return
    with lock, suppress(OSError):
        _refuse_locked(key, folder, lock)


def _refuse_locked(key: str, folder: Path, lock: IO[bytes]) -> None:
    """Lock a folder's file; InputError where another process has."""
    if not try_lock(lock):
        lock.seek(0)
        owner = lock.read().decode(errors="replace") or "another run"
        raise InputError(
            f"{key}: {folder} is in use by {owner}; wait for it, or use another folder"
        )


def _refuse_pipes(folder: Path) -> None:
    """Raise InputError for what no run leaves there, and logs would be added to, or results put."""
    for path in (*folder.iterdir(), *folder.glob("inference/**/*")):
        check_regular(path)


def _end_last_line(path: Path) -> None:
    """Cut off a line that ends in its middle, as a full disk leaves it: others would be added.

    A whole one gets its end, and a file that is not a run's stays as it is.
    """
    if not path.is_file():
        return
    with within_memory(path):
        content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if not content.startswith(b"{", start):
        return
    if is_json(content[start:]):
        with open(path, "ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, start)
