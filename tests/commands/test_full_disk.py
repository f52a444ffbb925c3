"""What commands do where files cannot be written, at the start and in the middle, on both hosts.

A limit on the size of files stands for a full disk: the system refuses a write in the same way.
"""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bn_det.commands.checkpoint import Checkpointer
from bn_det.commands.output_folder import used_by_one, written_in
from bn_det.commands.outputs import check_output
from bn_det.data.shapes import generate_shapes
from bn_det.errors import InputError
from bn_det.files import write_text
from here import run_here
from hosts import every_host
from reference import BASE, norm_opts


@contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"), *tiny_shapes),
        *("DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", *norm_opts("GN")),
    ]


def train(host, *args):
    return run_here("tools/train_net.py", "--host", host, "--config-file", BASE, *args)


@every_host
@pytest.mark.parametrize(
    "size, file",
    [(10**6, "model_0000003.pth"), (2000, "config.yaml")],
    ids=["checkpoint", "start"],
)
def test_what_was_there_is_kept(host, size, file, opts, tmp_path):
    out, reason = tmp_path / "out", "File too large"
    assert train(host, *opts, "SOLVER.MAX_ITER", "2").returncode == 0
    kept = [*out.glob("*.pth"), out / "last_checkpoint", *out.glob(file)]
    before = {p: p.read_bytes() for p in kept}
    more = ("--resume", *opts, "SOLVER.MAX_ITER", "4")
    with files_of_at_most(size):
        done = train(host, *more)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {out}/{file}: cannot be written: {reason}"
    assert "Traceback" not in done.stdout + done.stderr
    assert {p: p.read_bytes() for p in before} == before
    assert not list(out.glob("*.tmp")) and not (out / "model_0000003.pth").exists()
    if host == "torchvision" and size < 10**6:  # Detectron2 logs nothing before
        assert f"{out}/log.txt: ends here: {reason}" in done.stderr.splitlines()
    assert train(host, *more).returncode == 0
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 3


def test_no_file_is_half_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with (
        files_of_at_most(100),
        pytest.raises(InputError, match=f"^{path}: cannot be written: File too large$"),
    ):
        write_text(path, 1000 * "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path):
    checkpointer = Checkpointer(nn.Linear(50, 50), str(tmp_path))
    checkpointer.save("model")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    words = f"^{tmp_path}/model.pth: cannot be written: File too large$"
    for size in (100, 5000):  # the first and a later part of it
        with files_of_at_most(size), pytest.raises(InputError, match=words):
            checkpointer.save("model")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_line_without_an_end_is_cut_off(tmp_path):
    path = tmp_path / "metrics.json"
    for text, left in (('{"a": 1}\n{"a', '{"a": 1}\n'), ("{", ""), ("{}\n", "{}\n"), ("", "")):
        path.write_text(text)
        with used_by_one("OUTPUT_DIR", tmp_path):
            assert path.read_text() == left


def test_output_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^--output: {tmp_path}/file cannot be written to: "):
        check_output(str(tmp_path / "file" / "a.pth"), {"--weights": []})
    check_output(str(tmp_path / "new" / "a.pth"), {"--weights": []})
    assert list((tmp_path / "new").iterdir()) == []


def test_pictures_on_a_path_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}\n')
    path = str(tmp_path / "file" / "a.png")
    args = (f"a={tmp_path}", "--metric", "total_loss", "--output", path)
    done = run_here("tools/plot_metrics.py", *args)
    assert done.returncode == 1
    line = f"error: --output: {tmp_path}/file cannot be written to: File exists\n"
    assert done.stderr == line
    with files_of_at_most(100):
        done = run_here("tools/plot_metrics.py", *args[:-1], tmp_path / "a.png")
    assert done.stderr == f"error: --output: {tmp_path} cannot be written to: File too large\n"


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "{folder} cannot be written to: No sp"),
        (PermissionError(errno.EPERM, "Not permitted", b"/x/events"), "/x/events cannot be writ"),
        (TimeoutError(errno.ETIMEDOUT, "Timed out"), None),
    ],
)
def test_what_is_appended_to_names_the_folder(error, words, tmp_path):
    """As TensorBoard's and Detectron2's writers raise it; another error is no fault of a disk."""

    def fail():
        raise error

    with pytest.raises(InputError if words else TimeoutError) as e:
        written_in("OUTPUT_DIR", str(tmp_path), fail)
    if words:
        assert str(e.value).startswith("OUTPUT_DIR: " + words.format(folder=tmp_path))


def test_images_that_are_generated(tmp_path):
    with (
        files_of_at_most(500),
        pytest.raises(InputError, match=r"000000.png: could not be written: is the disk full\?"),
    ):
        generate_shapes(tmp_path / "shapes")
    assert not (tmp_path / "shapes").exists()
