"""Starting a function in several processes that together are a process group."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from ..errors import InputError, check_positive, one_line
from ..files import write_aside

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, as in Detectron2; evaluations are done meanwhile."""

_POLL = 0.5  # seconds

_MOST = 128
"""Processes of a machine that has no more cores: each takes some hundred megabytes."""

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun tells a process about its place, in _Place's order."""


FULL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EPERM, errno.EACCES),
}
"""What the system says of a file that could be opened, and cannot be written any more."""


def is_mendable(error: BaseException | None) -> TypeGuard[Exception]:
    """Whether a command's user can mend it; what the system refuses, if it says of which file.

    FloatingPointError is what a host raises for a model whose outputs are NaN or infinite.
    """
    if isinstance(error, OSError):
        names_file = error.filename is not None or isinstance(error, FileNotFoundError)
        return names_file or error.errno in FULL
    return isinstance(error, (InputError, FloatingPointError))


class RankError(RuntimeError):
    """One of several processes failed. The message says which and how, with its traceback."""


class _Place(NamedTuple):
    """A process among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def world_size(num_processes: int, num_machines: int = 1) -> int:
    """The number of processes on all machines together that ``launch`` leads to.

    Raises:
        InputError: a number is below 1, or beyond what a machine can hold.
    """
    if _under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    for flag, value in (("--num-gpus", num_processes), ("--num-machines", num_machines)):
        check_positive(flag, value)
    most = max(_MOST, os.cpu_count() or 1)
    if num_processes > most:
        raise InputError(f"--num-gpus: {num_processes} is not accepted; use 1 to {most}")
    return num_processes * num_machines


def is_first(machine_rank: int) -> bool:
    """Whether :func:`launch` is called on the first machine; under torchrun, by the first rank."""
    return int(os.environ["RANK"]) == 0 if _under_torchrun() else machine_rank == 0


def launch(
    fn: Callable[..., Any],
    args: Sequence[Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str | None = None,
) -> None:
    """Call ``fn(*args)`` in each process of a process group.

    * One process on one machine: the function is called here, without a process group.
    * Under torchrun (RANK and the like are in the environment): this process joins the group, and
      nothing is started; the numbers and the address are torchrun's.
    * Otherwise processes are started, and found ended when this returns. Where one fails, the
      others are ended at once; so are all when this process ends, however it does.

    Started processes have torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in their
    environment. On GPUs each has one of its own, and NCCL connects them. On the CPU gloo does, and
    the processes of a machine share its cores out as threads (OMP_NUM_THREADS can ask for fewer,
    and torchrun sets it to 1).

    Args:
        fn: a function of a module; it and its arguments are pickled.
        num_processes: on each machine.
        dist_url: where the processes meet, "auto" (one machine alone) or tcp://ADDRESS:PORT with
            an address of machine 0.
        device: "cuda" or "cpu"; by default what the machine has.

    Raises:
        InputError: a value is not accepted, or a process raised one.
        RankError: a process raised something else, or died.
    """
    world = world_size(num_processes, num_machines)
    if machine_rank not in range(num_machines):
        raise InputError(
            f"--machine-rank: {machine_rank} is not accepted with --num-machines "
            f"{num_machines}; use 0 to {num_machines - 1}"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if _under_torchrun():
        place = _Place(*(int(os.environ[name]) for name in _ENVIRONMENT))
        _check_device(device, place.local_world_size)
        with _process_group(device, place):
            fn(*args)
    elif world == 1:
        fn(*args)
    else:
        _check_device(device, num_processes)
        first = machine_rank * num_processes
        places = [_Place(first + k, world, k, num_processes) for k in range(num_processes)]
        with _meeting_point(dist_url, num_machines, machine_rank) as address:
            _run_all(fn, args, places, address, device)


def _under_torchrun() -> bool:
    return all(name in os.environ for name in _ENVIRONMENT)


def _check_device(device: str, num_processes: int) -> None:
    if device not in ("cuda", "cpu"):
        raise InputError(
            f"MODEL.DEVICE: {device!r} is not accepted with several processes; use 'cuda' (a GPU "
            "for each) or 'cpu'"
        )
    if device == "cuda" and num_processes > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus: {num_processes} is not accepted; this machine has "
            f"{torch.cuda.device_count()}"
        )


@contextmanager
def _meeting_point(
    dist_url: str, num_machines: int, machine_rank: int
) -> Iterator[tuple[str, int]]:
    """Host and port of the store where processes find each other, which machine 0 serves.

    This process serves it, and not rank 0: it has the port before any process starts.
    """
    host, port = _parse(dist_url, num_machines)
    store = None
    if machine_rank == 0:
        try:
            # A port that it can serve is reached at once, or is not at this address.
            store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
            )
        except dist.DistError as e:
            reason = str(e).splitlines()[0]
            raise InputError(
                f"--dist-url: {dist_url!r} is not accepted; use an address of machine 0, and a "
                f"port that no other process has taken ({reason})"
            ) from e
        port = store.port
    yield host, port


def _parse(dist_url: str, num_machines: int) -> tuple[str, int]:
    accepted = "tcp://ADDRESS:PORT"
    if num_machines == 1:
        if dist_url == "auto":
            return "127.0.0.1", 0  # a free port
        accepted = f"auto or {accepted}"
    try:
        parts = urlsplit(dist_url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    machines = f" with --num-machines {num_machines}" if num_machines > 1 else ""
    raise InputError(f"--dist-url: {dist_url!r} is not accepted{machines}; use {accepted}")


def _run_all(
    fn: Callable[..., Any],
    args: Sequence[Any],
    places: Sequence[_Place],
    address: tuple[str, int],
    device: str,
) -> None:
    """Start a process for each place, wait for all, and raise what ended the first that failed."""
    # Forking would not do: CUDA and the threads of torch do not survive it.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as reports:
        processes: dict[int, BaseProcess] = {}
        try:
            for place in places:
                # Not daemonic: a daemonic process could not have those of a data loader.
                process = context.Process(
                    target=_rank, args=(fn, args, place, address, device, reports)
                )
                process.start()
                processes[place.rank] = process
            _wait(processes, Path(reports))
        finally:
            _end(processes.values())


def _wait(processes: dict[int, BaseProcess], reports: Path) -> None:
    while True:
        running = [p for p in processes.values() if p.exitcode is None]
        # In this order: a process that ends has written its report.
        ended = {
            rank: p.exitcode
            for rank, p in processes.items()
            # Torch may abort a process that is through with its work, while others save theirs.
            if p.exitcode and not _done(reports, rank).exists()
        }
        reported = [pickle.loads(path.read_bytes()) for path in reports.glob("*.report")]
        if reported or ended:
            _raise_first(reported, ended)
        if not running:
            return
        # What a killed process has forked keeps its sentinel open: look again now and then.
        wait([p.sentinel for p in running], timeout=_POLL)


def _done(reports: Path, rank: int) -> Path:
    """A file that is there once a rank has done what it was started for."""
    return reports / f"{rank}.done"


def _raise_first(reported: list[tuple], ended: dict[int, int]) -> None:
    """Raise what began it: the others only lost their connection."""
    for rank, code in ended.items():
        # A process that NCCL aborts, because it has lost another, ends with SIGABRT.
        if code < 0 and not (reported and code == -signal.SIGABRT):
            raise RankError(f"rank {rank} was killed by {signal.Signals(-code).name}")
    if reported:
        _, rank, error, message = min(reported)
        if error == InputError.__name__:
            raise InputError(message)
        raise RankError(f"rank {rank} raised:\n{message}")
    rank, code = next(iter(ended.items()))
    raise RankError(f"rank {rank} ended with exit code {code}")


def _end(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        if process.pid is not None:  # it has been started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def _rank(
    fn: Callable[..., Any],
    args: Sequence[Any],
    place: _Place,
    address: tuple[str, int],
    device: str,
    reports: str,
) -> None:
    """What a started process does."""
    # Of its own, so that the processes of its data loader end with it, even if it is killed. Ctrl-C
    # then reaches the parent alone, which ends all.
    os.setpgid(0, 0)
    _end_at_once_with_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update({name: str(value) for name, value in zip(_ENVIRONMENT, place, strict=True)})
    try:
        store = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        with _process_group(device, place, store=store):
            fn(*args)
            _done(Path(reports), place.rank).touch()
    except Exception as e:
        # Before the connections close, which makes other ranks raise.
        is_input = is_mendable(e)
        message = one_line(e) if is_input else traceback.format_exc().rstrip()
        report = (time.time(), place.rank, InputError.__name__ if is_input else "", message)
        with write_aside(Path(reports) / f"{place.rank}.report") as aside:
            Path(aside).write_bytes(pickle.dumps(report))
        sys.exit(1)


def _end_at_once_with_parent() -> None:
    """Have Linux do it, where the interpreter is busy, too, and no thread of it would run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # as this process was started by one
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


@contextmanager
def _process_group(device: str, place: _Place, store: dist.Store | None = None) -> Iterator[None]:
    """Be in the process group of all; where a block fails, the process is to end."""
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    else:
        share = len(os.sched_getaffinity(0)) // place.local_world_size
        torch.set_num_threads(max(1, min(share, torch.get_num_threads())))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )
    yield
    dist.destroy_process_group()
