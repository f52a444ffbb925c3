#!/usr/bin/env python
"""Everything about the layers on a GPU, in one command of at most 6 minutes.

Measures side by side BatchNorm that the levels of a feature pyramid share, by itself, compiled and
in a RetinaNet head, training steps of detectors with each norm, and SyncBN; then runs the CUDA
tests of the layers. It needs torch, numpy and pytest, and torchvision for the detectors; bn_det
need not be installed. Writes gpu.json and gpu.md, the table of docs/gpu.md, after each part. A part
that fails does not keep the others from running: what has failed is in both files, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bn_det from this folder, installed or not

import torch
import torch.distributed as dist
from torch import nn

from bn_det import DomainBatchNorm2d
from bn_det.layers import PerLevel
from counting import collectives, host_waits, launches, peak_memory
from pyramid import FORMS, SIZES, Pass, Tower, make_levels, max_error
from timing import copied_bytes_per_s, graphed, median_ms, seconds

TOTAL_S = 350
"""For everything, the first import of torch and the end of a part that is cut off included."""

TITLES = {"joint": "ours", "concat": "concatenated", "per_level": "five BNs"}


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        device: "cuda" or "cpu".
        sizes: height and width of each level.
        rounds: that count, of each of three turns.
        turn_s: seconds of a turn, about.
        copied_bytes: how large a tensor is from which the speed of the memory is taken.
        image: height and width of the detectors' images.
        depth: of their ResNets.
        steps: of which detectors, how many images, and in which type.
        norms: names of those that steps are measured with; none for all.
        backend: of torch.compile.
    """

    device: str
    channels: int = 256
    batches: tuple[int, ...] = (2, 16)
    sizes: Sequence[tuple[int, int]] = SIZES
    rounds: int = 40
    turn_s: float = 0.3
    copied_bytes: int = 2**29
    image: tuple[int, int] = (640, 800)
    depth: int = 50
    steps: Sequence[tuple[str, int, str]] = (
        ("RetinaNet", 2, "float32"),
        ("RetinaNet", 16, "bfloat16"),
        ("Mask R-CNN", 2, "bfloat16"),
    )
    norms: Sequence[str] = ()
    backend: str = "inductor"

    def settings(self, layouts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Each batch, type and memory format."""
        for batch, dtype, layout in itertools.product(self.batches, DTYPES, layouts):
            yield {"batch": batch, "dtype": dtype, "layout": layout}

    def levels(self, batch: int, dtype: str, layout: str) -> tuple[list, list]:
        memory_format = LAYOUTS[layout]
        shape = (batch, self.channels, self.device)
        return make_levels(*shape, DTYPES[dtype], memory_format, self.sizes)

    def place(self, form: nn.Module, layout: str) -> nn.Module:
        return form.to(self.device, memory_format=LAYOUTS[layout])


DTYPES = {"float32": torch.float32, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def quick(device: str) -> Plan:
    """The same code in seconds: for a test, not for its numbers."""
    sizes = [(h // 4, w // 4) for h, w in SIZES]
    detectors = {
        "image": (64, 64),
        "depth": 18,
        "steps": [("RetinaNet", 2, "float32")],
        "norms": ["FrozenBatchNorm2d", "tune", "FrozenBatchNorm2d, shared BN in the head"],
        "backend": "aot_eager",
    }
    small = {"rounds": 1, "turn_s": 0.02, "copied_bytes": 2**20}
    return Plan(device, 8, (2,), sizes, **small, **detectors)


class Report:
    """What a part, in its own process, tells the one that has started it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def add(self, **row: Any) -> None:
        self._pipe.send(("row", row))

    def failed(self, what: str) -> None:
        self._pipe.send(("failed", what))

    def begin(self, case: str) -> None:
        self._pipe.send(("case", case))

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """A block that may fail."""
        self.begin(case)
        try:
            yield
        except Exception as e:
            self.failed(f"{case}: {type(e).__name__}: {first_line(str(e))}")


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def describe_machine(plan: Plan, report: Report) -> None:
    """The versions, the card, and the speed of its memory."""
    report.add(python=platform.python_version(), torch=torch.__version__)
    with suppress(ImportError):
        import triton

        report.add(triton=triton.__version__)
    if plan.device == "cpu":
        report.add(card=f"no GPU: {platform.machine()}, {torch.get_num_threads()} threads")
    else:
        with report.attempt("the card"):
            card = torch.cuda.get_device_properties(0)
            report.add(card=card.name, memory_gib=card.total_memory / 2**30)
            report.add(capability=f"{card.major}.{card.minor}", cuda=torch.version.cuda)
            report.add(cudnn=torch.backends.cudnn.version())
            report.add(tf32_convolutions=torch.backends.cudnn.allow_tf32)
    with report.attempt("the speed of a copy"):
        report.add(copied_bytes_per_s=copied_bytes_per_s(plan.copied_bytes, plan.device))


def run_tests(plan: Plan, report: Report) -> None:
    """The tests that are marked as CUDA's."""
    import pytest

    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_cuda*.py"))
    # Without the options that need pytest-xdist.
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts="]
    options += ["-q", "-p", "no:cacheprovider", "-m", "cuda"]
    outcomes = Outcomes(report)
    code = pytest.main([*options, *files], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.failed(f"pytest ended with {code!r}")
    if plan.device == "cuda" and not outcomes.passed:
        report.failed("no test has passed on the GPU")


class Outcomes:
    """A plugin of pytest that reports each test as it ends."""

    def __init__(self, report: Report) -> None:
        self._report, self.passed = report, 0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._report.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._add(report, "failed", report.longreprtext[-2000:])
        elif report.skipped:
            self._add(report, "skipped", report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self.passed += 1
            self._add(report, "passed", "")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report, "failed", report.longreprtext[-2000:])

    def _add(self, report: Any, outcome: str, why: str) -> None:
        self._report.add(test=report.nodeid, outcome=outcome, why=why)
        if outcome == "failed":
            errors = [line[1:].strip() for line in why.splitlines() if line.startswith("E ")]
            self._report.failed(f"{report.nodeid}: {errors[0] if errors else first_line(why)}")


def measure_pyramid(plan: Plan, report: Report) -> None:
    """The layer by itself."""
    for setting in plan.settings(list(LAYOUTS)):
        measure_forms(plan, report, FORMS, setting, in_graph=plan.device == "cuda")


def measure_compiled(plan: Plan, report: Report) -> None:
    """The layer by torch.compile, which makes its own kernels, here for one size."""
    for batch in plan.batches:
        setting = {"batch": batch, "dtype": "float32", "layout": "NCHW"}
        for name, make in FORMS.items():
            with report.attempt(f"batch {batch}, {name}"):
                torch._dynamo.reset()
                levels = plan.levels(**setting)
                form = plan.place(make(plan.channels), "NCHW")
                eager = Pass(copy.deepcopy(form), *levels)
                form.compile(backend=plan.backend, fullgraph=True, dynamic=False)
                compiled = Pass(form, *levels)
                row = {"compile_s": seconds(compiled), "max_abs_error": max_error(compiled, eager)}
                row |= median_ms({"eager_ms": eager, "ms": compiled}, plan.rounds, plan.turn_s)
                if plan.device == "cuda":
                    row |= count_launches_of(compiled)
                report.add(**setting, form=name, **row)


def measure_step(plan: Plan, report: Report) -> None:
    """Training steps of detectors, as one of two processes that wait for nobody."""
    try:
        import detectors
    except ModuleNotFoundError as e:
        report.add(form="none", note=str(e))
        return
    with process_group(GROUPS[1], plan.device):
        for detector, batch_size, dtype in plan.steps:
            measure_steps(plan, report, detectors, detector, batch_size, dtype)


def measure_steps(
    plan: Plan, report: Report, detectors: ModuleType, detector: str, batch_size: int, dtype: str
) -> None:
    """Steps of a detector with each norm, side by side; a row for each."""
    place = {"detector": detector, "batch": batch_size, "dtype": dtype}
    batch = detectors.make_batch(batch_size, *plan.image, plan.device)
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in detectors.names_for(detector):
        if plan.norms and name not in plan.norms:
            continue
        with report.attempt(f"{detector}, {batch_size} images, {name}"):
            torch.manual_seed(0)
            model = detectors.DETECTORS[detector](detectors.NORMS[name], plan.depth, *plan.image)
            autocast = None if dtype == "float32" else getattr(torch, dtype)
            steps[name] = step = detectors.Step(model.to(plan.device), batch, autocast)
            step()  # what is loaded, chosen and allocated once
            rows[name] = {"peak_mib": peak_memory(step, plan.device) / 2**20}
            if plan.device == "cuda":
                rows[name]["host_waits"] = host_waits(step)
    with report.attempt(f"{detector}, {batch_size} images, times"):
        for name, ms in median_ms(steps, plan.rounds, 2 * plan.turn_s).items():
            rows[name]["ms"] = ms
    for name, row in rows.items():
        report.add(**place, form=name, **row)


def measure_head(plan: Plan, report: Report) -> None:
    """The layer after each of four convolutions, which compute in float16 by autocast."""
    towers = {name: partial(Tower, make_norm=make) for name, make in FORMS.items()}
    for setting in plan.settings(list(LAYOUTS)):
        autocast = torch.float16 if setting["dtype"] == "float16" else None
        measure_forms(plan, report, towers, setting, autocast=autocast)


def measure_sync(plan: Plan, report: Report) -> None:
    """SyncBN, each level with its own statistics, in the groups that one GPU can have.

    In a group of one process neither layer exchanges anything: both are five BNs. So they are
    measured as one of two processes, too, but for what a collective would wait.
    """
    forms = {"ours": our_sync, "nn.SyncBatchNorm": torchs_sync}
    if plan.device == "cpu":
        del forms["nn.SyncBatchNorm"]
        report.add(form="nn.SyncBatchNorm", note="takes no CPU tensors in a process group")
    for group in GROUPS:
        with report.attempt(group), process_group(group, plan.device):
            for setting in plan.settings(["NCHW"]):
                measure_forms(plan, report, forms, setting, group=group)


def our_sync(channels: int) -> nn.Module:
    return DomainBatchNorm2d(channels, len(SIZES), affine="per_domain", group="world")


def torchs_sync(channels: int) -> nn.Module:
    return PerLevel(nn.SyncBatchNorm(channels) for _ in SIZES)


GROUPS = ("one process", "one of two, without waiting")


@contextmanager
def process_group(group: str, device: str) -> Iterator[None]:
    """A process group in the block: a real one of this process, or torch's fake one of two.

    The fake one's collectives copy what this process has instead of exchanging it.
    """
    if group == "one process":
        with tempfile.TemporaryDirectory() as folder:
            backend = "nccl" if device == "cuda" else "gloo"
            store = Path(folder, "store").as_uri()
            dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
            try:
                yield
            finally:
                dist.destroy_process_group()
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            with flat_gather():
                yield
        finally:
            dist.destroy_process_group()


@contextmanager
def flat_gather() -> Iterator[None]:
    """torch's gather into one tensor, of whatever shape, by the fake group.

    It gives each rank's part a place of the first dimension, of which nn.SyncBatchNorm has one.
    """
    gather = dist.all_gather_into_tensor

    def flat(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output.view(-1), tensor.view(-1), *args, **kwargs)

    dist.all_gather_into_tensor = flat
    try:
        yield
    finally:
        dist.all_gather_into_tensor = gather


def measure_forms(
    plan: Plan,
    report: Report,
    forms: Mapping[str, Callable[[int], nn.Module]],
    setting: Mapping[str, Any],
    *,
    autocast: torch.dtype | None = None,
    group: str | None = None,
    in_graph: bool = False,
) -> None:
    """Forward and backward passes over the same levels, side by side; a row for each form.

    Args:
        forms: by name, from the number of channels to a layer or tower.
        autocast: as in :class:`Pass`.
        group: the name of the process group, if there is one.
        in_graph: whether to measure the pass as a CUDA graph, too.
    """
    place = "batch {batch}, {dtype}, {layout}".format(**setting)
    where = dict(setting)
    if group is not None:
        place, where = f"{group}, {place}", {"group": group, **setting}
    passes: dict[str, Pass] = {}
    rows: dict[str, dict[str, Any]] = {}
    with report.attempt(place):
        levels = plan.levels(**setting)
        for name, make in forms.items():
            with report.attempt(f"{place}, {name}"):
                form = plan.place(make(plan.channels), setting["layout"])
                a_pass = Pass(form, *levels, autocast)
                a_pass()  # what is loaded, chosen and allocated once
                rows[name] = {"peak_mib": peak_memory(a_pass, plan.device) / 2**20}
                rows[name]["least_bytes"] = a_pass.least_bytes
                passes[name] = a_pass
        for name, a_pass in passes.items():
            with report.attempt(f"{place}, {name}, launches and collectives"):
                if group is not None:
                    rows[name]["collectives"] = collectives(a_pass)
                if plan.device == "cuda":
                    rows[name] |= count_launches_of(a_pass)
        with report.attempt(f"{place}, times"):
            for name, ms in median_ms(passes, plan.rounds, plan.turn_s).items():
                rows[name]["ms"] = ms
        if in_graph:
            with report.attempt(f"{place}, CUDA graphs"):
                replays = {name: graphed(a_pass) for name, a_pass in passes.items()}
                for name, ms in median_ms(replays, plan.rounds, plan.turn_s / 3).items():
                    rows[name]["graph_ms"] = ms
        if {"joint", "concat"} <= set(passes):
            with report.attempt(f"{place}, differences"):
                rows["joint"]["max_abs_error"] = max_error(passes["joint"], passes["concat"])
    for name, row in rows.items():
        report.add(**where, form=name, **row)


def count_launches_of(a_pass: Pass) -> dict[str, Any]:
    """The launches forward and backward, and the time that their kernels take."""
    forward, ys = launches(a_pass.forward)
    backward, _ = launches(partial(a_pass.backward, ys))
    known = None not in (forward.ms, backward.ms)
    return {
        "forward_launches": forward.number,
        "backward_launches": backward.number,
        "kernel_ms": forward.ms + backward.ms if known else None,
    }


class Part(NamedTuple):
    run: Callable[[Plan, Report], None]
    limit_s: float


PARTS = {
    "machine": Part(describe_machine, 25),
    "pyramid": Part(measure_pyramid, 75),
    "step": Part(measure_step, 130),
    "compiled": Part(measure_compiled, 80),
    "sync": Part(measure_sync, 60),
    "head": Part(measure_head, 60),
    "tests": Part(run_tests, 200),
}


def run_part(
    part: Callable[[Plan, Report], None],
    plan: Plan,
    limit_s: float,
    progress: Callable[[str], None],
) -> tuple[list[dict], list[str]]:
    """Run a part in a process of its own, which an error on the device or a limit may end.

    Args:
        limit_s: seconds after which the process is killed, and those that it has started.
        progress: is told what begins.

    Returns:
        the rows that it has reported, and what has failed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(part, plan, sender))
    process.start()
    sender.close()
    rows: list[dict] = []
    failed: list[str] = []
    try:
        case = _collect(receiver, time.monotonic() + limit_s, rows, failed, progress)
        if case is not None:
            failed.append(f"{case}: cut off after {limit_s:.0f} s")
    except EOFError as e:
        process.join()
        failed.append(f"{e}: its process died with exit code {process.exitcode}")
    finally:
        # Those that it has started are in its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return rows, failed


def _collect(
    receiver: Connection,
    deadline: float,
    rows: list[dict],
    failed: list[str],
    progress: Callable[[str], None],
) -> str | None:
    """Receive a part's report to its end; what it was at where the deadline came first.

    Raises:
        EOFError: there is no end; the message is what the part was at.
    """
    case = "the start"
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            kind, content = receiver.recv()
        except EOFError:
            raise EOFError(case) from None
        if kind == "end":
            return None
        if kind == "row":
            rows.append(content)
        elif kind == "failed":
            failed.append(content)
        else:
            case = content
            progress(case)
    return case


def _run_here(part: Callable[[Plan, Report], None], plan: Plan, pipe: Connection) -> None:
    os.setpgrp()
    os.dup2(2, 1)  # what torch and pytest print is no part of the table
    report = Report(pipe)
    with report.attempt("the start"):
        part(plan, report)
    pipe.send(("end", None))


def summarize(found: Mapping[str, list[dict]], failed: Sequence[str]) -> dict[str, Any]:
    """The content of gpu.json: the parts' rows, with what follows from several of them."""
    machine = {k: v for row in found["machine"] for k, v in row.items()}
    outcomes = Counter(row["outcome"] for row in found["tests"])
    return {
        "machine": machine,
        "tests": {
            **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
            "not_passed": [row for row in found["tests"] if row["outcome"] != "passed"],
        },
        "pyramid": with_floor(found["pyramid"], machine.get("copied_bytes_per_s")),
        **{name: found[name] for name in TABLES if name != "pyramid"},
        "failed": list(failed),
        "seconds": time.monotonic() - START,
    }


def with_floor(rows: Sequence[dict], bytes_per_s: float | None) -> list[dict]:
    """Rows with what no normalization can be faster than, as a row of each setting."""
    if bytes_per_s is None:
        return list(rows)
    setting: tuple = ()
    result: list[dict] = []
    for row in rows:
        floor_ms = 1e3 * row["least_bytes"] / bytes_per_s
        place = {k: row[k] for k in PLACES if k in row and k != "form"}
        if setting != (setting := tuple(place.values())):
            result.append({**place, "form": "floor", "ms": floor_ms, "times_floor": 1.0})
        result.append({**row, "times_floor": row["ms"] / floor_ms} if "ms" in row else row)
    return result


TABLES = {
    "pyramid": "Shared BatchNorm of a pyramid, forward and backward",
    "step": "Training step of a detector",
    "compiled": "Shared BatchNorm of a pyramid by torch.compile, forward and backward",
    "sync": "SyncBN of a pyramid, forward and backward",
    "head": "RetinaNet head, forward and backward",
}
"""The heads of what is measured."""

PLACES = ("group", "detector", "batch", "dtype", "layout", "form")
"""The columns that say what a row is of."""

COLUMNS = {
    "eager_ms": ("ms, eager", ".3f"),
    "ms": ("ms", ".3f"),
    "times_floor": ("times the floor", ".2f"),
    "graph_ms": ("ms as a CUDA graph", ".3f"),
    "kernel_ms": ("ms in kernels", ".3f"),
    "forward_launches": ("launches forward", "d"),
    "backward_launches": ("backward", "d"),
    "collectives": ("collectives", "d"),
    "host_waits": ("waits for the GPU", "d"),
    "compile_s": ("seconds to compile", ".1f"),
    "peak_mib": ("peak extra MiB", ".1f"),
    "max_abs_error": ("difference from concatenated", ".1e"),
    "note": ("note", "s"),
}
"""Of a table that has them: the head, and how a number is written."""


def to_markdown(result: Mapping[str, Any]) -> str:
    """The content of gpu.md."""
    machine, tests = result["machine"], result["tests"]
    names = ("card", "torch", "cuda", "cudnn", "triton", "python")
    versions = [f"{n} {machine[n]}" for n in names if machine.get(n) is not None]
    speed = machine.get("copied_bytes_per_s")
    copied = f"{speed / 1e9:.0f} GB/s" if speed else "not measured"
    why = sorted({row["why"] for row in tests["not_passed"] if row["outcome"] == "skipped"})
    lines = [
        f"{', '.join(versions).removeprefix('card ')}. A copy in its memory: {copied}.",
        "",
        f"CUDA tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} "
        f"skipped{''.join(f' ({reason})' for reason in why)}.",
    ]
    for name, head in TABLES.items():
        lines += ["", f"## {head}", "", *table(result[name])]
    if result["failed"]:
        lines += ["", "## Failed", "", *(f"- {what}" for what in result["failed"])]
    return "\n".join([*lines, ""])


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    if not rows:
        return ["Nothing has been measured."]
    places = [k for k in PLACES if any(k in row for row in rows)]
    columns = {k: v for k, v in COLUMNS.items() if any(k in row for row in rows)}
    heads = [*places, *(head for head, _ in columns.values())]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for row in rows:
        cells = [str(TITLES.get(row.get(k), row.get(k, ""))) for k in places]
        for k, (_, how) in columns.items():
            cells.append("" if row.get(k) is None else format(row[k], how))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


FILES = {"gpu.json": partial(json.dumps, indent=1), "gpu.md": to_markdown}
"""What is written to --output, each made of the result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), help="folder")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' is not accepted: torch sees no GPU here; use cpu")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            (args.output / file).write_text("")
    except OSError as e:
        parser.error(f"--output: {str(args.output)!r} cannot be written to: {e.strerror}")
    plan = quick(args.device) if args.quick else Plan(args.device)
    found: dict[str, list[dict]] = {name: [] for name in PARTS}
    failed: list[str] = []

    def left() -> float:
        return START + TOTAL_S - time.monotonic()

    for name in args.parts:
        part = PARTS[name]

        def progress(case: str, name: str = name) -> None:
            print(f"[{left():.0f} s left] {name}: {case}", file=sys.stderr, flush=True)

        limit_s = left() if args.quick else min(part.limit_s, left())
        found[name], of_part = run_part(part.run, plan, limit_s, progress)
        for what in of_part:
            failed.append(f"{name}: {what}")
            progress(f"FAILED: {what}")
        result = summarize(found, failed)
        for file, text_of in FILES.items():
            (args.output / file).write_text(text_of(result))
    print(json.dumps(result) if args.json else to_markdown(result))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
