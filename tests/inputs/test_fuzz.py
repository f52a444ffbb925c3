"""What comes in from outside, made from valid files by small changes.

Each is loaded as both hosts load it, without training. It gets an InputError of one line, or what
is loaded can be used, with finite numbers. FUZZ_EXAMPLES says how many of each kind.
"""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs.changes import changed
from inputs.test_annotation_files import valid
from inputs.test_weights import checkpointer
from pycocotools.cocoeval import COCOeval
from torch import nn

from bn_det.data.coco import CocoSource, load_coco
from bn_det.data.masks import decode_mask
from bn_det.errors import InputError, one_line
from here import ROOT
from hosts import every_host, make_cfg
from reference import BASE

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # milliseconds
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _host_is_imported(request):
    """Which takes longer than an example may, on a machine that is busy."""
    if "host" in request.fixturenames:
        make_cfg(request.getfixturevalue("host"), BASE)


def assert_one_line(error):
    line = one_line(error)
    assert line and line.isprintable() and len(line) < 1000, repr(str(error))


@pytest.mark.slow
@fuzzed
@given(content=changed(valid()))
def test_annotation_files(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    try:
        dataset = load_coco("mine", CocoSource(str(path), str(tmp_path)), True, True)
    except InputError as e:
        assert_one_line(e)
        return
    for record in dataset.records:
        for annotation in record["annotations"]:
            mask = decode_mask(annotation["segmentation"], record["height"], record["width"])
            assert mask.shape == (record["height"], record["width"])
            assert np.isfinite(annotation["bbox"]).all()
    assert_perfect_detections_are_perfect(dataset)


def assert_perfect_detections_are_perfect(dataset):
    found = [{**a, "score": 0.9} for a in dataset.coco.dataset["annotations"] if not a["iscrowd"]]
    if not found:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


CONFIGS = {
    name: yaml.safe_load((ROOT / "configs" / name).read_text())
    for name in ("Base-RCNN-Shapes.yaml", "Base-RetinaNet-Shapes.yaml", "quick_start.yaml")
}
"""All of one folder, so that each finds its base."""


@pytest.mark.slow
@every_host
@fuzzed
@given(content=st.sampled_from(sorted(CONFIGS)).flatmap(lambda name: changed(CONFIGS[name])))
def test_configs(host, tmp_path, content):
    base = content.get("_BASE_") if isinstance(content, dict) else None
    if isinstance(base, str) and base:
        content["_BASE_"] = str(ROOT / "configs" / base)
    path = tmp_path / "mine.yaml"
    try:
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
    except UnicodeEncodeError:
        return  # no text at all
    try:
        make_cfg(host, path)
    except InputError as e:
        assert_one_line(e)


def tree_of_weights():
    """Numbers of a few weights, in the place of tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    return {"model": {name: t.tolist() for name, t in model.state_dict().items()}, "iteration": 3}


def as_tensors(tree):
    """Tensors again, of whatever still is one."""
    if isinstance(tree, dict):
        return {key: as_tensors(value) for key, value in tree.items()}
    try:
        return torch.tensor(tree)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return tree


@pytest.mark.slow
@every_host
@fuzzed
@given(content=changed(tree_of_weights()), must_match=st.booleans(), cut=st.integers(0, 8))
def test_checkpoints(host, tmp_path, content, must_match, cut):
    path = tmp_path / "mine.pth"
    try:
        torch.save(as_tensors(content), path)
    except UnicodeEncodeError:
        return  # no name at all
    if cut == 0:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * len(str(content)) % len(whole)])
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    loads = checkpointer(host, model)
    loads.must_match = must_match
    try:
        loads.load(str(path))
    except InputError as e:
        assert_one_line(e)
        return
    assert model.eval()(torch.zeros(1, 1, 2, 2)).isfinite().all() or not must_match
