"""Files that are no checkpoints: what they are not, and what is accepted, in one line of ours."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from here import run_here
from hosts import every_host
from reference import BASE


class Code:
    """What runs a command when it is read."""

    def __reduce__(self):
        return os.system, (f"touch {Path.cwd() / 'ran'}",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(kind):
    """A file of a kind."""
    path = Path(f"{kind}.pth")
    if kind == "yaml":
        # Where the look at the file ends is the middle of a character.
        path.write_text(f"#{'ä' * 600}\n{Path(BASE).read_text()}")
    elif kind == "json":
        path.write_text('{"model": 1}')
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        torch.save({"model": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "code":
        torch.save({"model": Code()}, path)
    elif kind == "pickle":  # as pickle writes it, and not torch.save
        path.write_bytes(pickle.dumps({"model": {"a": 1}}))
    elif kind == "noise":  # for which torch's reader has errors of all kinds
        path.write_bytes(b"\x80\x02.")
    else:
        torch.save({1: torch.zeros(1)}, path)
    return path


KINDS = {
    "yaml": "it is a text file; use ",
    "json": "it is a text file; use ",
    "empty": "it is empty; use ",
    "truncated": "it is incomplete, or of another format; use ",
    "code": "it has objects of Python (posix.system), which may run any code when they are read; ",
    "pickle": "it is incomplete, or of another format; use ",
    "noise": "it is incomplete, or of another format; use ",
}


def check(done, start):
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith(f"error: {start}"), error
    assert "trust" not in error and not Path("ran").exists()


@every_host
@pytest.mark.parametrize("kind", [*KINDS, "unnamed"])
def test_evaluation(host, kind, tiny_shapes):
    path = make(kind)
    opts = ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out", "MODEL.WEIGHTS", path, *tiny_shapes)
    done = run_here("tools/train_net.py", "--host", host, "--config-file", BASE, "--eval-only",
                    *opts)  # fmt: skip
    reason = f"cannot be loaded as a checkpoint: {KINDS.get(kind)}"
    check(done, f"{path}: {'is no state dict' if kind == 'unnamed' else reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_a_file_itself(kind):
    path = make(kind)
    flags = ("--model", "torch.nn:Identity", "--data", "builtins:list", "--weights", path)
    done = run_here("tools/recompute_statistics.py", *flags)
    check(done, f"--weights: {path}: cannot be loaded as a checkpoint: {KINDS[kind]}")


def test_average(tiny_shapes):
    path = make("code")
    opts = ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out", *tiny_shapes)
    done = run_here("tools/average_checkpoints.py", "--host", "torchvision", "--config-file", BASE,
                    "--inputs", path, path, "--output", "a.pth", *opts)  # fmt: skip
    check(done, f"{path}: cannot be loaded as a checkpoint: {KINDS['code']}")
