"""Fused files of whole detectors, on both hosts."""

import copy

import pytest
import torch

from bn_det import fuse, unfuse
from bn_det.errors import InputError
from export import make_model
from hosts import every_host
from reference import BASE, RCNN_BASE, norm_opts

CONFIGS = {
    "RetinaNet": [BASE, "MODEL.RETINANET.BN.AFFINE", "per_domain"],
    "Mask R-CNN": [RCNN_BASE, *norm_opts("BN")],
}


@every_host
@pytest.mark.parametrize("detector", CONFIGS)
def test_a_fused_file_is_recognized_and_read(host, detector, tmp_path):
    """Loading one says what it is; unfuse reads it, and has the weights of a fused model again."""
    before = make_model(host, *CONFIGS[detector])
    model = copy.deepcopy(before)
    report = fuse(model)
    path = tmp_path / "fused.pth"
    torch.save({"model": model.state_dict()}, path)
    if host == "detectron2":
        from bn_det.d2.engine import Checkpointer
    else:
        from bn_det.commands.checkpoint import Checkpointer
    other = make_model(host, *CONFIGS[detector])
    with pytest.raises(InputError) as e:
        Checkpointer(other, str(tmp_path)).load(str(path))
    number = len(report.fused) - 1
    assert "is of a fused model: " in str(e.value) and f" and {number} more are inside" in str(
        e.value
    )
    unfuse(model)
    # Weights were multiplied and divided in float32, and sums of the bias cancel.
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=1e-4, atol=1e-4)
    other = make_model(host, *CONFIGS[detector])
    unfuse(other, path)
    fuse(other)
    fused = torch.load(path, weights_only=True)["model"]
    torch.testing.assert_close(other.state_dict(), fused, rtol=1e-4, atol=1e-4)
