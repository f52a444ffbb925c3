"""Run a function in processes that torch.distributed connects, with a time limit."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# Each child is forked from a server that has imported these once, so far as they are installed.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "bn_det", "bn_det.tv.trainer", "bn_det.d2.train"]
)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    backend: str = "gloo",
    stay: bool = True,
) -> list[Any]:
    """Call ``fn(rank, *args)`` on each rank of a process group.

    Args:
        fn: a function of a module (no closure). What it returns is saved with ``torch.save``.
        timeout: in seconds; then all ranks are killed, and the test fails.
        backend: "gloo", or "nccl", where each rank has the GPU of its number.
        stay: whether a rank that is done stays until all are. One that leaves closes connections
            that another may still be making, as for a new group.

    Returns:
        what each rank returned.

    Raises:
        RuntimeError: a rank raised, died or did not end; the others are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            pipe, other_end = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_rank,
                args=(fn, backend, rank, world_size, f"{folder}/store", other_end, stay, args),
            )
            process.start()
            other_end.close()
            pipes.append(pipe)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather_object",
    "reduce_scatter_tensor",
)


@contextmanager
def counted_collectives() -> Iterator[Counter]:
    """The number of calls of each function of torch.distributed that the block makes."""
    counts: Counter = Counter()
    real = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    names = {"all_gather_single": "all_gather_into_tensor"}  # since torch 2.14

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[names.get(name, name)] += 1
            return real[name](*args, **kwargs)

        return call

    try:
        for name in real:
            setattr(dist, name, counted(name))
        yield counts
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [p for rank, p in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RuntimeError(f"ranks {late} did not end in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, content = pipe.recv()
            except EOFError as e:
                raise RuntimeError(f"rank {rank} died") from e
            if failed:
                raise RuntimeError(f"rank {rank} raised:\n{content}")
            results[rank] = torch.load(io.BytesIO(content), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    fn: Callable[..., Any],
    backend: str,
    rank: int,
    world_size: int,
    store: str,
    pipe: Connection,
    stay: bool,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=Path(store).as_uri(), rank=rank, world_size=world_size
        )
        buffer = io.BytesIO()
        torch.save(fn(rank, *args), buffer)
        pipe.send((False, buffer.getvalue()))
    except Exception:
        pipe.send((True, traceback.format_exc()))
    if stay:
        with suppress(EOFError):  # whoever waits is gone
            pipe.recv()  # nothing comes: the process is killed
    elif dist.is_initialized():
        dist.destroy_process_group()
