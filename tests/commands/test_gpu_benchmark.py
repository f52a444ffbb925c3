"""benchmarks/gpu.py, on a CPU: what it writes, and that it goes on after what fails."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from devices import one_device

ROOT = Path(__file__).parents[2]
ABSENT = (
    *("cv2", "detectron2", "fvcore", "matplotlib", "pycocotools", "scipy", "tabulate"),
    *("tensorboard", "timm", "torchvision", "tqdm", "xdist", "yacs", "yaml"),
)
"""What a machine that is lent for its GPU may not have."""

LAYOUTS = ["NCHW", "channels_last"]
SETTINGS = set(itertools.product([2], ["float32", "float16"], LAYOUTS))


@pytest.fixture
def of_benchmarks(monkeypatch):
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # gpu.py adds to it
    return importlib.import_module


def run(folder, *args):
    """The command where nothing is installed but torch, numpy and pytest, nor bn_det."""
    folder.mkdir()
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    own = {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **own},
    )


@pytest.mark.slow
def test_quick_on_a_cpu(tmp_path):
    done = run(
        tmp_path / "absent",
        *("--device", "cpu", "--quick", "--json"),
        *("--output", tmp_path / "made"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "made" / "gpu.json").read_text())
    assert result["failed"] == []
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["copied_bytes_per_s"] > 0
    tests = result["tests"]
    if not torch.cuda.is_available():
        assert (tests["passed"], tests["failed"]) == (0, 0) and tests["skipped"] > 100
        assert {row["why"] for row in tests["not_passed"]} == {"no CUDA device"}
    for part in ("pyramid", "head"):
        rows = {(r["batch"], r["dtype"], r["layout"], r["form"]): r for r in result[part]}
        forms = {"joint", "concat", "per_level"} | ({"floor"} if part == "pyramid" else set())
        assert set(rows) == {(*s, form) for s in SETTINGS for form in forms}
        for (_, dtype, layout, form), row in rows.items():
            if form == "floor":
                # Bytes, not time: eight channels of 657 pixels in two images, moved eight times.
                size = {"float32": 4, "float16": 2}[dtype]
                least = 8 * 2 * 8 * (500 + 120 + 30 + 6 + 1) * size
                speed = result["machine"]["copied_bytes_per_s"]
                assert row["ms"] == pytest.approx(1e3 * least / speed)
                continue
            assert row["ms"] > 0 and row["peak_mib"] > 0
            if form == "joint":  # sums of a few hundred values
                assert row["max_abs_error"] < (1e-4 if dtype == "float32" else 0.1)
            if part == "pyramid":
                floor = rows[2, dtype, layout, "floor"]["ms"]
                assert row["times_floor"] == pytest.approx(row["ms"] / floor)
    assert result["step"] == [{"form": "none", "note": "no torchvision here"}]
    compiled = {row["form"]: row for row in result["compiled"]}
    assert set(compiled) == {"joint", "concat", "per_level"}
    for row in compiled.values():
        assert row["ms"] > 0 and row["compile_s"] > 0 and row["max_abs_error"] < 1e-4
    refused, *synced = result["sync"]
    assert refused["form"] == "nn.SyncBatchNorm" and "no CPU tensors" in refused["note"]
    assert [(r["group"], r["form"], r["collectives"]) for r in synced] == [
        *[("one process", "ours", 0)] * 2,
        *[("one of two, without waiting", "ours", 2)] * 2,
    ]
    check_table((tmp_path / "made" / "gpu.md").read_text(), result)


def check_table(text, result):
    """Every row of the result is a row of a table, as wide as its head."""
    title, *sections = text.split("\n## ")
    assert f"torch {torch.__version__}" in title
    assert f"CUDA tests: {result['tests']['passed']} passed" in title
    parts = ("pyramid", "step", "compiled", "sync", "head")
    for section, part in zip(sections, parts, strict=True):
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(result[part])
        assert len({line.count("|") for line in lines}) == 1, section


@pytest.mark.slow
def test_training_steps(of_benchmarks):
    gpu = of_benchmarks("gpu")
    rows, failed = gpu.run_part(gpu.measure_step, gpu.quick("cpu"), 200.0, print)
    assert not failed
    norms = ["FrozenBatchNorm2d", "tune", "FrozenBatchNorm2d, shared BN in the head"]
    assert [row["form"] for row in rows] == norms
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in rows)


def test_a_missing_gpu_is_told_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path / "absent", "--output", tmp_path / "made")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--device: 'cuda' is not accepted: torch sees no GPU here; use cpu" in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(
        tmp_path / "absent", "--device", "cpu", "--quick", "--output", tmp_path / "file" / "x"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written to: Not a directory" in done.stderr


def raises(plan, report):
    with report.attempt("a case"):
        raise torch.OutOfMemoryError("no memory\nfor this")
    report.add(card="known all the same")


def dies(plan, report):
    report.add(test="a", outcome="passed", why="")
    report.begin("a crash")
    os._exit(3)


def hangs(plan, report):
    time.sleep(600)


def works(plan, report):
    report.add(batch=plan.batches[0], form="joint", least_bytes=8, ms=1.5)


@pytest.mark.slow
def test_what_fails_is_told_and_does_not_stop_the_rest(
    of_benchmarks, tmp_path, monkeypatch, capsys
):
    gpu = of_benchmarks("gpu")
    parts = {"machine": raises, "tests": dies, "pyramid": hangs, "head": works, "sync": works}
    parts |= {"step": works, "compiled": works}
    limits = {"pyramid": 2.0}
    parts = {name: gpu.Part(part, limits.get(name, 100.0)) for name, part in parts.items()}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "START", time.monotonic())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["failed"] == [
        "machine: a case: OutOfMemoryError: no memory",
        "tests: a crash: its process died with exit code 3",
        "pyramid: the start: cut off after 2 s",
    ]
    assert result["machine"]["card"] == "known all the same" and result["tests"]["passed"] == 1
    assert result["pyramid"] == [] and result["head"][0]["ms"] == result["sync"][0]["ms"] == 1.5
    text = (tmp_path / "gpu.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "- pyramid: the start: cut off after 2 s" in text and "| 2 | ours | 1.500 |" in text


def test_forms_keep_the_memory_format(of_benchmarks):
    gpu = of_benchmarks("gpu")
    plan = gpu.quick("cpu")
    for setting in plan.settings(gpu.LAYOUTS):
        xs, _ = plan.levels(**setting)
        for make in gpu.FORMS.values():
            for y in make(plan.channels)(xs):
                assert y.is_contiguous(memory_format=gpu.LAYOUTS[setting["layout"]])


def test_forms_on_one_device(of_benchmarks):
    """No tensor of the CPU in what is measured on a GPU."""
    gpu = of_benchmarks("gpu")
    plan = gpu.quick("meta")
    with one_device():
        for setting in plan.settings(gpu.LAYOUTS):
            for make in gpu.FORMS.values():
                for form in (make(plan.channels), gpu.Tower(plan.channels, make)):
                    half = setting["dtype"] == "float16" and isinstance(form, gpu.Tower)
                    form = plan.place(form.half() if half else form, setting["layout"])
                    xs, grads = plan.levels(**setting)
                    ys, gradients = gpu.Pass(form, xs, grads)()
                    assert {t.device.type for t in (*ys, *gradients)} == {"meta"}


def event(id, name, device=DeviceType.CPU, us=0, **kwargs):
    return FunctionEvent(id, name, thread=0, start_us=0, end_us=us, device_type=device, **kwargs)


def test_launches_of_a_profile(of_benchmarks):
    counting = of_benchmarks("counting")
    gpu = DeviceType.CUDA
    events = [
        event(1, "aten::add"),
        event(2, "cudaLaunchKernel"),
        event(2, "add_kernel", gpu, 30),
        event(3, "cudaMemsetAsync"),
        event(3, "Memset (Device)", gpu, 10),
        event(4, "cudaLaunchKernelExC"),
        event(4, "cuLaunchKernelEx"),  # which the call before makes
        event(4, "ncclKernel", gpu, 60),
        event(5, "nccl:all_reduce", gpu, 70, is_user_annotation=True),
        event(6, "cudaDeviceSynchronize"),
    ]
    assert counting.count_launches(events) == (3, 0.1)
    lost = [e for e in events if e.name != "add_kernel"]
    assert counting.count_launches(lost) == (3, None)
    with pytest.raises(RuntimeError, match="seen no launch"):
        counting.count_launches(events[:1])
