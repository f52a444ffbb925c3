"""Run a command in this process, which has imported torch and what else it needs."""

from __future__ import annotations

import io
import logging
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


@contextmanager
def same_loggers() -> Iterator[None]:
    """Undo what the set-up of loggers does in the block."""
    loggers = [logging.getLogger(name) for name in ("", "bn_det", "detectron2", "fvcore")]
    before = [(logger.propagate, logger.level, logger.handlers[:]) for logger in loggers]
    try:
        yield
    finally:
        for logger, (propagate, level, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers[:] = propagate, handlers
            logger.setLevel(level)


def run_here(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository with arguments, as ``python SCRIPT ARGS`` does.

    Each command has one test that starts it as a process; its other tests begin here, where nothing
    has to be imported again. An exception that would end the process with a traceback is raised.
    """
    path = str(ROOT / script)
    out, err = io.StringIO(), io.StringIO()
    argv, paths, threads = sys.argv[:], sys.path[:], torch.get_num_threads()
    code: object = None
    try:
        sys.argv[:] = [path, *map(str, args)]
        sys.path.insert(0, str(Path(path).parent))
        with same_loggers(), redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv[:], sys.path[:] = argv, paths
        torch.set_num_threads(threads)
    if isinstance(code, str):
        print(code, file=err)
    returncode = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess([path, *args], returncode, out.getvalue(), err.getvalue())
