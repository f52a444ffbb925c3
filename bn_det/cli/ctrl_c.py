"""Imported before torch: Ctrl-C then ends a command in one line, as it does later on."""

from __future__ import annotations

import signal
import sys
from types import TracebackType


def _in_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


sys.excepthook = _in_one_line
