"""Files that memory cannot hold, and what they get: the line of a file that cannot be used."""

import os
import resource
import sys
from pathlib import Path

import pytest
from inputs.test_weights import checkpointer
from PIL import Image
from torch import nn

from bn_det.cli.visualize import load_detections
from bn_det.commands.output_folder import used_by_one
from bn_det.commands.results import read_metrics
from bn_det.config.yaml_file import load_yaml
from bn_det.data.coco import CocoSource, load_coco
from bn_det.data.images import check_image, read_image
from bn_det.errors import InputError
from hosts import INSTALLED, every_host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")

LEFT = 2**28
"""Bytes that a test may take; each of the files has 2**33."""


@pytest.fixture
def little_memory():
    """Whatever this machine has, and would promise."""
    if INSTALLED:
        import bn_det.d2.engine  # noqa: F401, which takes more
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LEFT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def large(path):
    """A file that takes nearly nothing of the disk."""
    path.touch()
    os.truncate(path, 2**33)
    return path


READS = {
    "a.json": lambda path: load_coco("mine", CocoSource(str(path), str(path.parent))),
    "detections.json": lambda path: load_detections(str(path)),
    "metrics.json": lambda path: read_metrics(path.parent),
    "a.yaml": lambda path: load_yaml(str(path)),
}


@pytest.mark.parametrize("name", READS)
def test_text(name, tmp_path, little_memory):
    path = large(tmp_path / name)
    with pytest.raises(InputError, match=rf"^{path}: is too large to be read into memory; use an"):
        READS[name](path)


def test_metrics_of_a_folder_that_is_written_in(tmp_path, little_memory):
    path = large(tmp_path / "metrics.json")
    with (
        pytest.raises(InputError, match=f"^{path}: is too large to be read"),
        used_by_one("OUTPUT_DIR", tmp_path),
    ):
        pass


def test_image(tmp_path, little_memory):
    """No more than Pillow takes, but as RGB."""
    path = tmp_path / "a.png"
    Image.new("1", (16_000, 11_000)).save(path)
    check_image(path)
    with pytest.raises(InputError, match=f"^{path}: is too large to be read into memory"):
        read_image(path)


@every_host
@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.pyth", "a", "a.safetensors"])
def test_weights(host, name, tmp_path, little_memory):
    path = large(tmp_path / name)
    with pytest.raises(InputError, match=f"^{path}: cannot be loaded as a checkpoint: ") as e:
        checkpointer(host, nn.Linear(1, 1)).load(str(path))
    assert "\n" not in str(e.value)
