"""How the benchmarks of one process take the time of a call."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

_TURNS, _WARM_UP, _FEWEST = 3, 12, 3
_COPIES = 10


def seconds(function: Callable[[], object]) -> float:
    """Of a call, from an idle GPU to an idle GPU where there is one."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def median_ms(
    calls: Mapping[str, Callable[[], object]], rounds: int, turn_s: float = math.inf
) -> dict[str, float]:
    """Median milliseconds of each call, over three turns of 12 rounds of warm-up and then rounds.

    A turn is of one call alone: how much memory the allocator holds warm depends on what ran
    before, and in training that is the same every time.

    Args:
        turn_s: where a turn would take longer, it has fewer rounds, three of each kind at least.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            _repeat(call, _WARM_UP, turn_s / 4)
            times[name] += _repeat(call, rounds, turn_s)
    return {name: 1e3 * statistics.median(of_call) for name, of_call in times.items()}


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph, whose replay takes the host no time: the same work on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_FEWEST):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copied_bytes_per_s(num_bytes: int, device: str) -> float:
    """Bytes that a copy moves in a second, read and written: the speed of the memory.

    Args:
        num_bytes: of what is copied; more than any cache holds.
    """
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_COPIES):
            target.copy_(source)

    ms = median_ms({"copy": copy}, rounds=3, turn_s=1.0)["copy"]
    return 1e3 * _COPIES * 2 * num_bytes / ms


def _repeat(call: Callable[[], object], rounds: int, limit_s: float) -> list[float]:
    """Seconds of each round; after the limit no more rounds than the fewest."""
    end = time.perf_counter() + limit_s
    times: list[float] = []
    while len(times) < rounds and (len(times) < _FEWEST or time.perf_counter() < end):
        times.append(seconds(call))
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
