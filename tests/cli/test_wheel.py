"""A wheel, installed beside what is here, and used outside of any checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bn_det.cli.main import COMMANDS
from bn_det.version import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ("bn_det", "configs", "LICENSE", "README.md", "pyproject.toml", "setup.py")
TINY = (
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "OUTPUT_DIR", "out"),
    *("TEST.PRECISE_BN.ENABLED", "False"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, as a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs ``bn-det`` of the wheel in a folder."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--target", site, wheel)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def bn_det(folder, *args, **variables):
        command = [sys.executable, site / "bin" / "bn-det", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=folder,
            env={**environment, **variables},
        )  # fmt: skip

    bn_det.site = site
    return bn_det


def pip(command, *args):
    flags = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *flags, *map(str, args)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_it_has_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"bn_det/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "bn_det/configs/quick_start.yaml" in configs and configs <= names
    assert "bn_det/py.typed" in names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"bn_det", f"bn_det-{__version__}.dist-info"}


def test_its_commands(installed, tmp_path):
    """The script's first lines, and those of ``python -m``."""
    done = installed(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert installed(tmp_path, "--version").stdout == f"bn_det {__version__}\n"
    code = "import runpy, sys; sys.argv[:] = ['bn-det', 'average', '--help']\n"
    code += "try: runpy.run_module('bn_det', run_name='__main__')\n"
    code += "finally: import bn_det; print(bn_det.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed.site)},
    )  # fmt: skip
    assert done.stdout.startswith("usage: bn-det average ") and "Example: bn-det " in done.stdout
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(installed.site)


def test_trains_and_examines_outside_of_a_checkout(installed, tmp_path, tiny_variants):
    """A packaged config by its name; what the doctor prescribes is a command that is there."""
    done = installed(
        tmp_path, "train", "--host", "torchvision", "--config-file", "quick_start.yaml", *TINY,
        DETECTRON2_DATASETS=str(tiny_variants),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    name = next(key for key in saved["model"] if key.endswith("running_var"))
    saved["model"][name].fill_(-1)
    torch.save(saved, tmp_path / "broken.pth")
    done = installed(tmp_path, "doctor", "broken.pth")
    assert done.returncode == 3, done.stderr
    assert "mend: " in done.stdout and "tools/" not in done.stdout
    done = installed(tmp_path, "reproduce", "domain-shift", "--host", "torchvision", "--dry-run")
    assert "bn-det train --host torchvision --config-file configs/" in done.stdout
    config = done.stdout.partition("--config-file ")[2].split()[0]
    assert (installed.site / "bn_det" / config).is_file()


def test_a_host_that_is_not_there(installed, tmp_path):
    """One line; the import of Detectron2 is blocked where it is installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['detectron2'] = None")
    paths = os.pathsep.join([str(tmp_path), str(installed.site)])
    args = ("train", "--host", "detectron2", "--config-file", "quick_start.yaml")
    done = installed(tmp_path, *args, PYTHONPATH=paths)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --host: 'detectron2' is not installed; use 'torchvision'")
    assert len(done.stderr.splitlines()) == 1
