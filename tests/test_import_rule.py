"""The import rule of the design, as .ci/run checks it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "import_rule.py"


def check(package):
    return subprocess.run(
        [sys.executable, SCRIPT, package], capture_output=True, text=True, timeout=60
    )


def test_this_package_keeps_the_rule():
    done = check(ROOT / "bn_det")
    assert done.returncode == 0, done.stdout


def write(package, **files):
    for file, text in files.items():
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (package / "__init__.py").touch()
    return check(package)


@pytest.mark.parametrize(
    "file, line",
    [
        ("layers/moments.py", "import torchvision.ops"),
        ("layers/joint.py", "def f():\n    from detectron2 import layers"),
        ("layers/joint.py", "from ..d2 import train"),
        ("layers/joint.py", "from ..population.update import x"),
        ("errors.py", "from . import layers"),
        ("config/keys.py", "from bn_det.commands import cli"),
        ("data/coco.py", "from .. import __version__"),
        ("d2/train.py", "from ..tv.data import x"),
        ("tv/model.py", "import bn_det.d2"),
        ("tv/model.py", "import detectron2"),
        ("tv/model.py", "import importlib; importlib.import_module('detectron2.layers')"),
        ("layers/a.py", "from importlib import import_module as im; im('torchvision')"),
        ("layers/a.py", "import importlib; importlib.import_module(name='bn_det.tv')"),
        ("layers/a.py", "import importlib; importlib.import_module('.tv', 'bn_det')"),
        ("layers/a.py", "import importlib; importlib.import_module('..tv', __package__)"),
        ("layers/a.py", "__import__('tv', globals(), locals(), ['x'], 2)"),
        ("layers/a.py", "__import__(name='detectron2')"),
    ],
)
def test_violations_are_named(tmp_path, file, line):
    package = tmp_path / "bn_det"
    rooms = ["", "layers/", "population/", "commands/", "d2/", "tv/"]
    faces = {f"{room}__init__.py": "" for room in rooms}
    done = write(package, **faces, **{file: line})
    assert done.returncode == 1
    number = len(line.splitlines())
    assert done.stdout.startswith(f"bn_det/{file}:{number}: "), done.stdout
    assert "may not import" in done.stdout and len(done.stdout.splitlines()) == 1


def test_a_folder_that_is_no_package_is_not_taken_for_one(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1 and "is no package" in done.stderr


def test_a_file_in_no_room_is_named(tmp_path):
    done = write(tmp_path / "bn_det", **{"attic/old.py": "", "helpers.py": "import torch"})
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.startswith("bn_det/attic/old.py: attic is no room")
    assert second.startswith("bn_det/helpers.py: helpers is no room")


def test_a_file_that_cannot_be_read(tmp_path):
    done = write(tmp_path / "bn_det", **{"layers/a.py": "\nimport"})
    assert done.returncode == 1
    assert done.stderr.startswith("bn_det/layers/a.py:2: cannot be read: ")


def test_the_folder_that_one_is_in(tmp_path):
    write(tmp_path / "bn_det", **{"layers/a.py": "from ..tv import x", "tv/__init__.py": ""})
    command = [sys.executable, SCRIPT, "."]
    done = subprocess.run(command, cwd=tmp_path / "bn_det", capture_output=True, text=True)
    assert done.returncode == 1 and "layers may not import tv" in done.stdout


def test_a_circle_is_named_by_the_imports_that_close_it(tmp_path):
    files = {
        "layers/__init__.py": "from .a import x",
        "layers/a.py": "\nfrom .b import x",
        "layers/b.py": "def f():\n    from .c import x",
        "layers/c.py": "from . import a",
    }
    done = write(tmp_path / "bn_det", **files)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    steps = ["bn_det/layers/a.py:2", "bn_det/layers/b.py:2", "bn_det/layers/c.py:1"]
    assert line.startswith("circle: ") and all(step in line for step in steps)


def test_a_file_that_imports_its_own_face_is_a_circle(tmp_path):
    files = {"layers/__init__.py": "from .a import x", "layers/a.py": "from . import y"}
    done = write(tmp_path / "bn_det", **files)
    assert done.returncode == 1 and done.stdout.startswith("circle: ")
