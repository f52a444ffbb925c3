"""Files that are never half-written, and what is looked at before one is read."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from .errors import InputError

_ASIDE = re.compile(r"\.\d+\.bn_det\.tmp$")


def try_lock(file: IO) -> bool:
    """Lock an open file until this process closes it or ends; False where another one has it.

    Raises:
        OSError: files cannot be locked there.
    """
    try:
        # Not flock, which workers of a data loader that outlive their process would still hold.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def aside_of(path: str | os.PathLike) -> str:
    """The file that is written first, of which each of several runs has its own."""
    return f"{os.fspath(path)}.{os.getpid()}.bn_det.tmp"


@contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[str]:
    """A path to write to instead, which replaces the real one once the block is done.

    If the block fails, the real one stays as it was. A link stays one: what it leads to is written.

    Raises:
        InputError: it cannot be written.
    """
    check_replaceable(path)
    real = os.path.realpath(path)
    aside = aside_of(real)
    try:
        yield aside
        os.replace(aside, real)
    except (OSError, RuntimeError) as e:
        if interrupt := _interrupt_behind(e):
            raise interrupt from None
        if reason := _reason_of_system(e):
            raise InputError(f"{path}: cannot be written: {reason}") from e
        raise
    finally:
        with suppress(OSError):
            os.remove(aside)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came after, which may have begun it."""
    while error is not None:
        yield error
        error = error.__context__


def _reason_of_system(error: BaseException) -> str:
    """What the system said, where that began an error: torch's own of a full disk has no reason."""
    reasons = (e.strerror for e in _chain(error) if isinstance(e, OSError) and e.strerror)
    return next(reasons, "")


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Ctrl-C, where torch's writer then failed, as its file has no end."""
    return next((e for e in _chain(error) if isinstance(e, KeyboardInterrupt)), None)


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise InputError for what is there and no file, as a rename would put a file in its place."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(
            f"{path}: cannot be written: it is no file, but a folder, a device, a pipe or a link "
            "to nothing"
        )


def check_regular(path: str | os.PathLike) -> None:
    """Raise InputError for what is no file, such as a pipe, which would be waited for without end.

    Of what is not there, or is a folder, the system says what it is when it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: of a name that no file can have
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: is a pipe, a device or a socket; use a file")


@contextmanager
def within_memory(path: str | os.PathLike) -> Iterator[None]:
    """Name the file that is read in the block where that takes more memory than there is.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except MemoryError as e:
        raise InputError(f"{path}: is too large to be read into memory; use another file") from e


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, in UTF-8.

    Raises:
        InputError: it is no file, but a pipe or the like, or larger than memory.
        OSError, UnicodeDecodeError: it cannot be read, or has other bytes.
    """
    check_regular(path)
    with within_memory(path):
        return Path(path).read_bytes().decode()


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        InputError, OSError: as :func:`read_text`.
        ValueError, RecursionError: as :func:`parse_json`.
    """
    with within_memory(path):
        return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """What a JSON file has.

    Raises:
        ValueError: it is not valid, or an object has a key twice, of which Python keeps the last.
        RecursionError: it has too many parts in each other.
    """
    return json.loads(text, object_pairs_hook=_without_twins)


def is_json(text: str | bytes) -> bool:
    """Whether :func:`parse_json` takes it."""
    try:
        parse_json(text)
    except (RecursionError, ValueError):
        return False
    return True


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} stands twice in the object {repr(content)[:60]}")
    return content


def check_writable(key: str, folder: str | os.PathLike) -> None:
    """Make a folder where there is none.

    Raises:
        InputError: it cannot be, or no file can be in it. It begins with the key.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(bytes(4096))  # a full disk still takes an empty one
    except OSError as e:
        raise InputError(f"{key}: {folder} cannot be written to: {e.strerror}") from e


def check_other_file(key: str, output: str | os.PathLike, inputs: Sequence[str], flag: str) -> None:
    """Raise InputError unless a file can be written, another than those that are read.

    Args:
        key: the flag that the output is given by.
        inputs: what is read, by this flag.
    """
    path = Path(output)
    read = [of for of in inputs if os.path.exists(of)]
    if path.is_dir() or any(path.exists() and path.samefile(of) for of in read):
        raise InputError(f"{key}: {str(output)!r} is not accepted; use another file than {flag}")
    check_writable(key, path.parent)
    check_replaceable(path)


def is_aside(path: Path) -> bool:
    """Whether a file is one that :func:`write_aside` writes to first, by its name."""
    return _ASIDE.search(path.name) is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, aside."""
    with write_aside(path) as aside:
        Path(aside).write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file, aside, for people to read as well."""
    write_text(path, json.dumps(content, indent=1))


def finite(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
