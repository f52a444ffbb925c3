"""Two runs in one folder, and what killed ones leave there, on both hosts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bn_det.commands.output_folder import used_by_one
from bn_det.commands.outputs import check_output
from bn_det.errors import InputError
from bn_det.files import write_aside, write_text
from here import ROOT, run_here
from hosts import every_host
from reference import BASE, norm_opts


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"), *tiny_shapes),
        *("SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.001", *norm_opts("GN")),
    ]


HOLD = """
import sys, time
from bn_det.commands.output_folder import used_by_one
with used_by_one("OUTPUT_DIR", sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that is in the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.wait(60)


@every_host
@pytest.mark.parametrize("more", [[], ["--num-gpus", "2"]], ids=["1", "2"])
def test_a_second_run_is_refused(host, more, other, opts, tmp_path):
    before = sorted(os.listdir(tmp_path / "out"))
    args = ("--host", host, "--config-file", BASE, *more, *opts)
    done = run_here("tools/train_net.py", *args)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: OUTPUT_DIR: {tmp_path}/out is in use by process {other.pid} of")
    assert line.endswith("; wait for it, or use another folder")
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_killed_run_leaves_no_lock(other, tmp_path):
    with (
        pytest.raises(InputError, match="is in use by process"),
        used_by_one("OUTPUT_DIR", tmp_path / "out"),
    ):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait(60)
    (tmp_path / "out" / "inference" / "a").mkdir(parents=True)
    end = "bn_det.tmp"
    aside = [f"model.pth.12.{end}", f"inference/r.json.345.{end}", f"inference/a/r.json.6.{end}"]
    others = ["mine.tmp", "notes.2024.tmp", "model.pth.tmp", "model.12.pth"]
    for name in (*aside, *others):
        (tmp_path / "out" / name).touch()
    with used_by_one("OUTPUT_DIR", tmp_path / "out"):
        found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert found == {".lock", "inference", "inference/a", *others}


@pytest.mark.parametrize(
    "before, after",
    [
        ('{"a": 1}\n{"a":', '{"a": 1}\n'),
        ('{"a":', ""),
        ('{"a": 1}\n{"a": 2}', '{"a": 1}\n{"a": 2}\n'),
        ('{"AP": 41.2}', '{"AP": 41.2}\n'),
        ('{\n  "AP": 41.2\n}', '{\n  "AP": 41.2\n}'),
        ('[\n{"AP": 41.2}\n]', '[\n{"AP": 41.2}\n]'),
        ("", ""),
    ],
)
def test_the_end_of_the_metrics(before, after, tmp_path):
    """A line that a full disk has cut is none; nothing else is lost."""
    (tmp_path / "metrics.json").write_text(before)
    with used_by_one("OUTPUT_DIR", tmp_path):
        assert (tmp_path / "metrics.json").read_text() == after


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "in"):
        with (
            pytest.raises(InputError, match=f"OUTPUT_DIR: {path} cannot be written to: "),
            used_by_one("OUTPUT_DIR", path),
        ):
            pass


@pytest.mark.parametrize("name", ["log.txt", "metrics.json", ".lock", "inference/a/b.json"])
def test_a_pipe_in_the_folder(name, tmp_path):
    """What is written to it would wait for a reader."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with (
        pytest.raises(InputError, match=f"{path}: is a pipe, a device or a socket; use a file"),
        used_by_one("OUTPUT_DIR", tmp_path),
    ):
        pass


@pytest.mark.slow
@every_host
def test_two_at_once(host, opts, tmp_path):
    """One of them runs as if it were alone, the other gets its line."""
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--host", host]
    command += ["--config-file", BASE, *opts]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [p.communicate(timeout=240) for p in processes]
    codes = [p.returncode for p in processes]
    assert sorted(codes) == [0, 1], outputs
    assert "is in use by process" in outputs[codes.index(1)][1].splitlines()[-1]
    assert torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_no_output_into_the_folder_of_another_run(other, tmp_path):
    with pytest.raises(InputError, match=rf"^--output: .*/out is in use by process {other.pid} of"):
        check_output(str(tmp_path / "out" / "model_final.pth"), {})


def test_output_into_the_folder_of_the_command(tmp_path):
    """Which still has it then."""
    folder = tmp_path / "out"
    with used_by_one("OUTPUT_DIR", folder):
        check_output(str(folder / "new.pth"), {})
        done = subprocess.run(
            [sys.executable, "-c", HOLD, str(folder)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1 and f"is in use by process {os.getpid()} of" in done.stderr
    check_output(str(folder / "new.pth"), {})


def test_no_output_of_another_format(tmp_path):
    with pytest.raises(InputError, match="new.safetensors' is not accepted; torch.save writes it"):
        check_output(str(tmp_path / "new.safetensors"), {})
    with pytest.raises(InputError, match="new.pkl' is not accepted: files of that name are read"):
        check_output(str(tmp_path / "new.pkl"), {})


def test_a_link_stays_one(tmp_path):
    """What it leads to is written, and left as it was by what fails."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "file")
    with pytest.raises(ZeroDivisionError), write_aside(link) as aside:
        Path(aside).write_text("half")
        1 / 0  # noqa: B018
    assert link.read_text() == "old"
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "real" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "real") == ["file"]


def test_no_output_whose_table_is_another_file(tmp_path):
    """Beside a checkpoint that is there a table is that of it, and is replaced with it."""
    other = tmp_path / "new.json"
    other.write_text("{}")
    with pytest.raises(
        InputError, match=f"its table would replace {other}, which is there without"
    ):
        check_output(str(tmp_path / "new.pth"), {})
    (tmp_path / "new.pth").touch()
    check_output(str(tmp_path / "new.pth"), {})


def test_no_output_into_a_device():
    with pytest.raises(InputError, match="^/dev/zero: is a pipe, a device or a socket"):
        check_output("/dev/zero", {})
