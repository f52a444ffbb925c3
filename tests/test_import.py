"""``import bn_det`` needs torch and nothing else."""

import subprocess
import sys

import pytest

import bn_det

BLOCKED = (
    "cv2",
    "detectron2",
    "fvcore",
    "matplotlib",
    "numpy",
    "pycocotools",
    "scipy",
    "tabulate",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
    "yacs",
    "yaml",
)
"""All that setup.py asks for beside torch, and numpy, which torch itself can do without."""

LAYERS = """
import torch, bn_det
from bn_det import layers

bn_det.BatchNorm2d(3, group="world")(torch.randn(2, 3, 4, 4)).sum().backward()
xs = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
bn_det.DomainBatchNorm2d(3, 2, statistics="shared")(xs)
with bn_det.roi_levels([1, 0]):
    bn_det.RoILevelBatchNorm2d(3, 2)(xs[0])
with bn_det.image_sources([1, 0]):
    bn_det.SourceBatchNorm2d(3, 2)(xs[0])
bn_det.L1BatchNorm2d(3)(xs[0])
bn_det.shuffle(xs[0])
model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), bn_det.BatchNorm2d(3))
with bn_det.virtual_batch(model, xs[0]):
    model(xs[1])
assert bn_det.update_bn_stats(model, [xs[0]], 1).num_batches == 1
bn_det.fuse(bn_det.freeze(model).eval())
"""


def run_blocked(code):
    block = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_layers_work_where_nothing_but_torch_is_installed():
    done = run_blocked(LAYERS)
    assert done.returncode == 0, done.stderr


def test_what_needs_more_says_so_once_it_is_asked_for():
    done = run_blocked("import bn_det\nbn_det.add_bn_det_config")
    assert done.returncode == 1 and "yacs" in done.stderr.splitlines()[-1]


def test_every_public_name_is_there():
    for name in bn_det.__all__:
        assert getattr(bn_det, name).__module__.startswith("bn_det.")
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = bn_det.no_such_name
