"""What a call of the benchmarks holds at once, launches, exchanges, and waits for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Most bytes that a call holds at once beside what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Launches(NamedTuple):
    """What a call has a GPU do.

    Attributes:
        number: of kernels, and of copies and fills of memory.
        ms: milliseconds that they take together, without the time between them; None where the
            profiler has not seen all of them.
    """

    number: int
    ms: float | None


def launches(call: Callable[[], Any]) -> tuple[Launches, Any]:
    """What a call has the GPU do, by the profiler, and what it returns."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        result = call()
        torch.cuda.synchronize()
    return count_launches(profiler.events()), result


_LAUNCHING = (
    "cudaLaunchKernel",  # and cudaLaunchKernelExC
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",  # and cuLaunchKernelEx
    "cuLaunchCooperativeKernel",
    "cudaMemcpy",
    "cudaMemset",
)


def count_launches(events: Iterable[FunctionEvent]) -> Launches:
    """The launches in a profile.

    The profiler sees each twice, in the call that launches and on the device. It loses some of the
    latter at times (pytorch/pytorch#192021), and may not know the name of the former.

    Raises:
        RuntimeError: there are none.
    """
    events = list(events)
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    num_calls = len({e.id for e in events if e.name.startswith(_LAUNCHING)})
    number = max(num_calls, len(on_device))
    if not number:
        raise RuntimeError("the profiler has seen no launch; CUPTI, which it needs, may be missing")
    us = sum(e.time_range.elapsed_us() for e in on_device)
    return Launches(number, us / 1e3 if len(on_device) == number else None)


def host_waits(call: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a call, as far as torch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode(before)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.set_warn_always(False)
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def collectives(call: Callable[[], object]) -> int:
    """The number of torch.distributed's collectives in a call."""
    with _Collectives() as mode:
        call()
    return mode.number


class _Collectives(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))
