"""Checks that a fused detector can be exported, the same for both hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hosts
from bn_det import fuse
from reference import assert_close_by_scale, randomize

EXACT = "donot_use_mm_for_euclid_dist"


def make_model(host: str, config: str, *opts: str) -> nn.Module:
    """A host's detector for evaluation, in which every parameter and statistic matters."""
    model = hosts.build_model(host, hosts.make_cfg(host, config, *opts)).eval()
    randomize(model)
    return model


def fused(model: nn.Module, num_norms: int) -> nn.Module:
    """The model, in evaluation mode, of which nothing is left alone."""
    report = fuse(model.eval())
    assert report.left == {} and len(report.fused) == num_norms
    return model


def num_norms(graph: torch._C.Graph) -> int:
    """In a TorchScript graph, with all that it calls. A FrozenBatchNorm2d has an rsqrt."""
    torch._C._jit_pass_inline(graph)
    nodes = [graph.findAllNodes(f"aten::{op}", recurse=True) for op in ("batch_norm", "rsqrt")]
    return sum(map(len, nodes))


def make_images() -> list[Tensor]:
    """Two of noise."""
    return list(torch.rand(2, 3, 128, 128) * 255)


def medium_score(detector: nn.Module, images: Sequence[Tensor]) -> float:
    """As a threshold it leaves another number of detections in each of two images.

    It is as far from every score as it can be, for rounding to make no difference.
    """
    with torch.no_grad():
        scores = [
            next(y for y in detector(image) if y.dim() == 1 and y.is_floating_point())
            for image in images
        ]
    merged = torch.cat(scores).sort()[0]
    for k in merged.diff().argsort(descending=True):
        threshold = (merged[k] + merged[k + 1]).item() / 2
        first, second = (int((of_image > threshold).sum()) for of_image in scores)
        if 0 < first != second > 0:
            break
    return threshold


def check_trace(model: nn.Module, image: Tensor, other: Tensor) -> None:
    """Trace a detector on an image and run it on another one.

    Args:
        model: from an image to columns of the detections: boxes, scores and so on; fused.
    """
    with torch.no_grad():
        traced = torch.jit.trace(model, (image,), check_trace=False)
        found, expected = traced(other), model(other)
        assert 0 < len(expected[0]) != len(model(image)[0]) > 0
    assert num_norms(traced.graph) == 0
    # The same operations in the same order.
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-6, atol=1e-6)


def check_program(model: nn.Module, images: Tensor, other: Tensor) -> None:
    """Export a model from images to feature maps by torch.export, and run it on other images."""
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        found, expected = program.module()(other), model(other)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [t for t in targets if "batch_norm" in t or "rsqrt" in t]
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-6, atol=1e-6)


def check_onnx(model: nn.Module, image: Tensor, other: Tensor, path: Path, *, dynamo: bool) -> None:
    """As ``check_trace``, by torch.onnx and onnxruntime.

    Args:
        dynamo: whether as ``check_program`` rather than by tracing.
    """
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with torch.no_grad():
        if dynamo:
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
            torch.onnx.export(model, (image,), path, dynamo=True, optimize=False)
        else:
            torch.onnx.export(model, (image,), path, dynamo=False, opset_version=17)
        expected = model(other)
    assert not [n for n in onnx.load(path).graph.node if "Normalization" in n.op_type]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    found = [torch.from_numpy(y) for y in session.run(None, {name: other.numpy()})]
    assert [y.shape for y in found] == [y.shape for y in expected]
    if dynamo:
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close_by_scale(a, b, str(k))
    else:
        # Of two scores that are equal but for rounding either can come first.
        differences = torch.cdist(_rows(found), _rows(expected), compute_mode=EXACT)
        assert differences.amin(0).max() < 1e-3 and differences.amin(1).max() < 1e-3


def _rows(columns: Sequence[Tensor]) -> Tensor:
    """The detections, each as one row."""
    number = len(columns[0])
    return torch.cat([y.double().view(number, -1) for y in columns if len(y) == number], 1)
