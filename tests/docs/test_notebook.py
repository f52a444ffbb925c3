"""The notebook is run, cell by cell, as its readers do."""

import json

import pytest
import torch

from bn_det.doctor import examine_file
from here import ROOT

NOTEBOOK = ROOT / "examples/repair_a_checkpoint.ipynb"


@pytest.fixture
def cells():
    content = json.loads(NOTEBOOK.read_text())
    return ["".join(of["source"]) for of in content["cells"] if of["cell_type"] == "code"]


def test_the_notebook(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "a notebook"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["before"] < 50 < 90 < names["after"]
    assert [of.name for of in names["report"].tried if of.kept] == ["recomputed statistics"]
    assert [of.rule for of in examine_file("teacher.pth").findings] == ["BN101"]
    assert not examine_file("mended.pth").findings
    states = [torch.load(f"{name}.pth", weights_only=True) for name in ("teacher", "mended")]
    teacher, mended = (of["model"] for of in states)
    changed = {name for name in teacher if not torch.equal(teacher[name], mended[name])}
    assert changed == {name for name in teacher if "running_" in name}


def test_its_output_is_there():
    """Of every cell that prints, as a reader on a web page sees no other."""
    content = json.loads(NOTEBOOK.read_text())
    code = [of for of in content["cells"] if of["cell_type"] == "code"]
    assert [bool(of["outputs"]) for of in code] == [
        "print(" in "".join(of["source"]) for of in code
    ]
