"""The import rule of the design, as .ci/run checks it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "import_rule.py"


def check(package):
    return subprocess.run(
        [sys.executable, SCRIPT, package], capture_output=True, text=True, timeout=60
    )


def test_this_package_keeps_the_rule():
    done = check(ROOT / "bn_det")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "file, line",
    [
        ("moments.py", "import torchvision.ops"),
        ("layers/joint.py", "def f():\n    from detectron2 import layers"),
        ("layers/joint.py", "from ..d2 import train"),
        ("moments.py", "from . import tv"),
        ("d2/train.py", "from ..tv.data import x"),
        ("tv/model.py", "import bn_det.d2"),
        ("tv/model.py", "import detectron2"),
        ("tv/model.py", "import importlib; importlib.import_module('detectron2.layers')"),
    ],
)
def test_violations_are_named(tmp_path, file, line):
    package = tmp_path / "bn_det"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(line)
    done = check(package)
    assert done.returncode == 1
    assert f"bn_det/{file}:" in done.stdout and "may not import" in done.stdout
