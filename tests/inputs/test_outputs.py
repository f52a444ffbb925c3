"""Outputs over what a command reads, and names that no file can have: refused before any work."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from here import run_here
from hosts import every_host
from reference import BASE

CODE = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def batches():
    return []
"""
LONG = "name" * 75  # of 255 bytes at most
NEARLY = "name" * 62 + ".pth"  # which a file can have, but not while it is written


@pytest.fixture
def project(tiny_shapes, tmp_path, monkeypatch):
    """A folder of all that a command reads, in which the command is called; options for a host."""
    sets = ast.literal_eval(tiny_shapes[1])
    for entry in sets:
        folder = tmp_path / entry[0]
        folder.mkdir()
        shutil.copy(entry[1], folder / "a.json")
        image = min(Path(entry[2]).iterdir())
        shutil.copy(image, folder / "0.png")
        entry[1:] = [str(folder / "a.json"), str(folder)]
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("from . import helper\n")
    (tmp_path / "a_package" / "deep.py").write_text(CODE)
    (tmp_path / "a_package" / "helper.py").write_text("")
    (tmp_path / "base.yaml").write_text(f"_BASE_: {BASE}\n")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    torch.save({"model": {}}, tmp_path / "old.pth")
    monkeypatch.chdir(tmp_path)
    for name in ("a_package", "a_package.deep", "a_package.helper"):  # of the test before
        sys.modules.pop(name, None)
    return tmp_path, [tiny_shapes[0], repr(sets), *tiny_shapes[2:], "MODEL.DEVICE", "cpu"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix != ".pyc"
            and path.is_file()}  # fmt: skip


OF_CONFIG = {
    "config.yaml": r"use another file than (--config-file|what is examined)",
    "base.yaml": "use another file than a file that is _BASE_ of --config-file",
    "tiny_val/a.json": "use another file than the annotation file of tiny_val|the table gets that",
    "tiny_train/a.pth": "use another file than the annotation file of tiny_train",
    "tiny_train/0.png": "use another file than an image of tiny_train",
    LONG: "'name.*' is not accepted: File name too long; use another name",
    NEARLY: "'name.*' is not accepted: File name too long; use another name",
}


def refused(done, flag, words):
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {flag}"), line
    return len(line) < 400 and re.search(words, line)


@every_host
@pytest.mark.parametrize("output", OF_CONFIG)
def test_with_a_config(host, output, project):
    folder, opts = project
    before = contents(folder)
    config = "--host", host, "--config-file", "config.yaml", *opts, "OUTPUT_DIR", folder / "out"
    commands = [
        ("tools/recompute_statistics.py", "--weights", "old.pth", "--output", output),
        ("tools/average_checkpoints.py", "--inputs", "old.pth", "old.pth", "--output", output),
        ("tools/doctor.py", "MODEL.WEIGHTS", "old.pth", "--treat", output),
    ]
    if output != "tiny_train/a.pth":  # beside which the others write a table
        commands.append(("tools/doctor.py", "MODEL.WEIGHTS", "old.pth", "--output", output))
    for script, *args in commands:
        done = run_here(script, *config, *args)
        assert refused(done, args[-2], OF_CONFIG[output]), done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["__init__", "deep", "helper"])
def test_code_that_is_in_use(name, project):
    folder, _ = project
    before, output = contents(folder), f"a_package/{name}.py"
    any_model = "--model", "a_package.deep:make", "--data", "a_package.deep:batches"
    for script, *args in (
        ("tools/recompute_statistics.py", "--weights", "old.pth", "--output", output),
        ("tools/doctor.py", "old.pth", "--treat", output),
        ("tools/doctor.py", "old.pth", "--output", output),
    ):
        done = run_here(script, *any_model, *args)
        assert refused(done, args[-2], "another file than a file of code that is in use")
    assert contents(folder) == before
