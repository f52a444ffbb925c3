"""tools/reproduce.py, on tiny data."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from here import run_here
from waiting import wait_for

ROOT = Path(__file__).parents[2]
QUICK = ("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0", "TEST.PRECISE_BN.NUM_ITER", "1")
HOST = ("--host", "torchvision", "--seeds", "1")
LONG = ("domain-shift", *HOST, "SOLVER.MAX_ITER", "100000", "SOLVER.IMS_PER_BATCH", "2")


def command(tiny_variants, folder, *args):
    """How it is started, as subprocess takes it."""
    return {
        "args": [sys.executable, str(ROOT / "tools" / "reproduce.py"), *args],
        "text": True,
        "cwd": folder,
        "env": {**os.environ, "DETECTRON2_DATASETS": str(tiny_variants), "OMP_NUM_THREADS": "1"},
    }


def run(tiny_variants, folder, *args):
    return subprocess.run(**command(tiny_variants, folder, *args), capture_output=True, timeout=300)


def run_in(tiny_variants, folder, *args):
    """The same, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DETECTRON2_DATASETS", str(tiny_variants))
        return run_here("tools/reproduce.py", *args)


@contextlib.contextmanager
def begun(tiny_variants, folder, *args):
    """It runs; in the end nothing does that works in the folder."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(**command(tiny_variants, folder, *args), stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        for left in working_in(folder):
            os.kill(left, signal.SIGKILL)


def working_in(folder):
    """The processes whose working directory is a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # not ours, or ended
            found += [int(link.parent.name)] if link.readlink() == folder else []
    return found


@pytest.mark.slow
def test_an_experiment(tiny_variants, tmp_path):
    """The shortest, from nothing to its report; then once more, with nothing to do."""
    done = run_in(tiny_variants, tmp_path, "domain-shift", *HOST, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| domain-shift |           1 |              3 |" in done.stdout
    folder = tmp_path / "output" / "reproduce"
    report = folder / "domain-shift-shapes-torchvision"
    results = json.loads((report / "results.json").read_text())
    assert results["host"] == "torchvision" and results["opts"] == list(QUICK)
    assert len(results["steps"]) == 4 and not results["failed"]
    assert [c["name"] for c in results["claims"]] == ["AdaBN"]
    rows = results["tables"]["domain-shift"][0]["rows"]
    assert all(row["box AP, its own statistics"] == [0.0] for row in rows), "after two steps"
    page = (report / "report.html").read_text()
    assert "these are not the settings that the claims were written down for" in page
    assert "bn-det recompute --host torchvision" in page
    assert (report / "domain_shift.png").is_file() and "AdaBN" in (report / "claims.md").read_text()

    runs = folder / "runs-shapes-torchvision"
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*.pth")}
    again = run_in(tiny_variants, tmp_path, *QUICK, *HOST, "domain-shift")
    assert again.returncode == 2, "KEY VALUE pairs come last"
    again = run_in(tiny_variants, tmp_path, *HOST, "domain-shift", *QUICK)
    assert again.returncode == 0 and "0 of 4 steps are to be run" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*.pth")} == before

    # The training is the base of another experiment.
    other = run_in(tiny_variants, tmp_path, "multi-domain", "--dry-run", *HOST, *QUICK)
    assert "11 of 12 steps are to be run" in other.stdout
    # Its report is not written over this one.
    other = run_in(tiny_variants, tmp_path, "frozen", *HOST, "--output", str(report), *QUICK)
    assert other.returncode == 1
    assert "has a report with experiment 'domain-shift', and this is one with 'frozen'" in (
        other.stderr
    )
    other = run_in(tiny_variants, tmp_path, "domain-shift", *HOST, *QUICK, "SOLVER.BASE_LR", "0.1")
    assert other.returncode == 1 and "has a report with opts" in other.stderr
    where = ("--output", "elsewhere")
    other = run_in(
        tiny_variants, tmp_path, "domain-shift", *HOST, *where, *QUICK, "SOLVER.BASE_LR", "0.1"
    )
    assert (
        other.returncode == 1 and "--runs: " in other.stderr and "another command" in other.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")
def test_a_termination_ends_what_runs(tiny_variants, tmp_path):
    logs = tmp_path / "output" / "reproduce" / "runs-shapes-torchvision"

    def trains():
        return any("eta" in p.read_text().lower() for p in logs.rglob("reproduce.log"))

    with begun(tiny_variants, tmp_path, *LONG) as process:
        wait_for(lambda: trains() or process.poll() is not None)
        assert len(working_in(tmp_path)) > 1, "the command and the training"
        process.terminate()
        assert "interrupted: the same command goes on" in process.communicate(timeout=60)[1]
        assert process.returncode == 1 and not working_in(tmp_path)


def test_a_folder_in_which_another_command_is_at_work(tiny_variants, tmp_path):
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_in(tiny_variants, tmp_path, *LONG[:3], "--runs", "runs")
    assert done.returncode == 1 and "another command is at work in runs" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")
def test_a_kill_leaves_no_second_writer(tiny_variants, tmp_path):
    """What the killed command had started may go on, and keeps others out of its folder."""

    def trains():  # `import torch` starts processes, too
        return any(tmp_path.rglob("reproduce.log")) and len(working_in(tmp_path)) > 1

    with begun(tiny_variants, tmp_path, *LONG) as process:
        wait_for(trains)
        process.kill()
        process.communicate()
        again = run(tiny_variants, tmp_path, *LONG)
        assert working_in(tmp_path) and "another command is at work in" in again.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (["multi-domain", "--data", "coco"], "--data: 'coco' is not accepted: there is no "),
        (["correlated", "--data", "coco"], "is not accepted with correlated"),
        (["leakage", "--num-gpus", "2"], "--num-gpus: 2 is not accepted with --data shapes"),
        (["leakage", "--seeds", "1000000"], "--seeds: 1000000 is not accepted; use 1 to 1000"),
        (["leakage", "SOLVER.MAXITER", "3"], "SOLVER.MAXITER: '3' is not accepted: Non-existent"),
        (
            ["leakage", *QUICK],
            "SOLVER.MAX_ITER and SOLVER.CHECKPOINT_PERIOD: 2 and 500 are not accepted with "
            "train/mask_rcnn-BN-seed1, whose checkpoint of iteration 500 is measured",
        ),
        (["leakage", "--seeds", "0"], "--seeds: 0 is not accepted; use 1 or more"),
        (["leakage", "SEED"], "SEED: has no value"),
        (["leakage", "TEST.EVAL_PERIOD", "0"], "TEST.EVAL_PERIOD: is not accepted; experiments"),
        (["leakage", "SEED", "7"], "SEED: is not accepted; --seeds says it"),
        (["leakage", "--output", "file"], "--output: file cannot be written to: File exists"),
        (
            ["leakage", "--runs", "file/runs"],
            "--runs: file/runs cannot be written to: Not a directory",
        ),
        (
            ["leakage", "--data", "coco", "--dry-run"],
            "--host: 'torchvision' is not accepted with --data coco, whose trainings begin with "
            "Detectron2's ResNet-50",
        ),
    ],
)
def test_bad_input(tiny_variants, tmp_path, args, words):
    (tmp_path / "file").touch()
    done = run_in(tiny_variants, tmp_path, *HOST, *args)
    assert done.returncode == 1 and words in done.stderr, done.stderr


@pytest.mark.slow
def test_benchmark_of_loss_spikes(tiny_variants, tmp_path, monkeypatch):
    """A training that is slow, and one that diverges; what has been run is not run again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_variants))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets, too
    small = ("INPUT.MIN_SIZE_TRAIN", "(32,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "55")
    args = ("domain-shift", "--seeds", "1", "--json", "--rates", "0.001", "1e30", "--opts", *small)
    for _ in range(2):
        done = run_here("benchmarks/loss_spikes.py", *args)
        assert done.returncode == 0, done.stderr
        slow, diverged = json.loads(done.stdout)
        assert (slow["rate"], slow["threads"]) == (0.001, 1)
        assert slow["by_seed"]["1"] > 0 and diverged["by_seed"]["1"] is None
    assert "starts train/" not in done.stderr
    assert not list(Path("output").rglob("*.pth")), "losses alone"


def test_coco_is_looked_for_in_its_folder(tmp_path):
    """The error names the first thing that is missing, until nothing is."""
    coco = tmp_path / "coco"
    for name in ("annotations/instances_train2017.json", "train2017",
                 "annotations/instances_val2017.json", "val2017"):  # fmt: skip
        done = run_in(tmp_path, tmp_path, "leakage", "--data", "coco", *HOST)
        assert f"there is no {coco / name}. COCO is looked for below {coco}" in done.stderr
        (coco / name).parent.mkdir(parents=True, exist_ok=True)
        (coco / name).touch() if name.endswith("json") else (coco / name).mkdir()
    done = run_in(tmp_path, tmp_path, "leakage", "--data", "coco", *HOST)
    assert "--num-gpus: 8 is not accepted: this machine has 0 GPUs" in done.stderr


def test_fewer_gpus_on_coco(tmp_path):
    """What is run on 4 GPUs with --yes; a dry run asks for neither that nor data."""
    args = ("leakage", "--data", "coco", "--num-gpus", "4", "--dry-run", *HOST)
    opts = ("MODEL.WEIGHTS", "r50.pth", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    done = run(tmp_path, tmp_path, *args, *opts)
    assert done.returncode == 0, done.stderr
    assert "8 images a step instead of 16; the learning rate is scaled by 0.5" in done.stdout
    line = next(x for x in done.stdout.splitlines() if "head_SyncBN" in x)
    for words in ("--num-gpus 4", "SOLVER.IMS_PER_BATCH 8", "SOLVER.BASE_LR 0.01",
                  "SOLVER.MAX_ITER 540000", "SOLVER.CHECKPOINT_PERIOD 18000",
                  "TEST.EVAL_PERIOD 180000"):  # fmt: skip
        assert words in line
