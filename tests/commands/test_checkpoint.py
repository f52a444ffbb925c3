import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_det.commands.checkpoint import Checkpointer
from bn_det.commands.results import results_table
from bn_det.errors import InputError, choose, nearest, reason_of
from bn_det.files import write_aside


def test_write_aside(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_aside(path) as aside:
        open(aside, "w").close()
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with write_aside(path) as aside, open(aside, "w") as f:
        f.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_only_plain_data_is_loaded(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": nn.Linear(2, 2)}, path)  # a pickled module runs code when loaded
    with pytest.raises(InputError, match="cannot be loaded as a checkpoint"):
        Checkpointer(nn.Linear(2, 2)).load(str(path))


def test_plain_state_dict(tmp_path):
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    Checkpointer(target).load(str(tmp_path / "model.pth"))
    assert torch.equal(source.weight, target.weight)


def test_shapes_have_to_fit(tmp_path):
    class Model(nn.Module):
        def __init__(self, channels, classes):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)
            self.cls_score = nn.Conv2d(3, classes, 1)

    path = str(tmp_path / "model.pth")
    Checkpointer(Model(4, 5), str(tmp_path)).save("model")
    with pytest.raises(InputError, match=r"conv.weight: .* \(4, 3, 1, 1\), .* \(6, 3, 1, 1\)"):
        Checkpointer(Model(6, 5)).load(path)
    Checkpointer(Model(4, 7)).load(path)
    strict = Checkpointer(Model(4, 7))
    strict.must_match = True
    with pytest.raises(InputError, match="cls_score"):
        strict.load(path)


class Normalizing(nn.Module):
    """Has constants of the config, as Detectron2's detectors have."""

    def __init__(self, mean=(103.53, 116.28, 123.675)):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_constants_of_earlier_checkpoints(suffix, tmp_path):
    """Until 2021 Detectron2 saved them."""
    model, path = Normalizing(), str(tmp_path / f"model.{suffix}")
    constants = {
        "pixel_mean": model.pixel_mean,
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
    }
    weights = {**model.state_dict(), **constants}
    if suffix == "pth":
        torch.save({"model": weights}, path)
    else:
        arrays = {name: weight.double().numpy() for name, weight in weights.items()}
        Path(path).write_bytes(pickle.dumps({"model": arrays}))
    for mean in ((103.53, 116.28, 123.675), (0.0, 0.0, 0.0)):
        loads = Checkpointer(Normalizing(mean))
        loads.must_match = True
        other = pytest.raises(
            InputError, match=r"pixel_mean: .* \[103.5\d+, .* MODEL.PIXEL_MEAN is"
        )
        with other if mean[0] == 0 else nullcontext():
            loads.load(path)


PREDICTORS = [
    "roi_heads.box_predictor.cls_score",
    "roi_heads.mask_head.predictor",
    "roi_heads.keypoint_head.score_lowres",
    "sem_seg_head.predictor",
    "proposal_generator.rpn_head.objectness_logits",
    "proposal_generator.rpn_head.anchor_deltas",
    "rpn.head.cls_logits",
    "head.bbox_pred",
]


@pytest.mark.parametrize("name", PREDICTORS)
def test_final_predictors_may_begin_anew(name, tmp_path):
    """Of other classes, or other anchors."""

    def make_model(channels):
        model = nn.Module()
        model.backbone = nn.Conv2d(3, 4, 1)
        model.add_module(name.split(".")[0], part := nn.Module())
        for of in name.split(".")[1:-1]:
            part.add_module(of, part := nn.Module())
        part.add_module(name.split(".")[-1], nn.Conv2d(4, channels, 1))
        return model

    Checkpointer(make_model(3), str(tmp_path)).save("model")
    Checkpointer(make_model(6)).load(str(tmp_path / "model.pth"))


def test_errors_say_what_is_accepted():
    with pytest.raises(InputError, match=r"KEY: 3 is not accepted; use one of \[1, 2\]"):
        choose("KEY", 3, [1, 2])
    assert nearest("shape_train", ["shapes_train", "x"]) == "nearest names: ['shapes_train']"
    assert nearest("zzz", ["b", "a"]) == "known names: ['a', 'b']"


def test_results_table():
    metrics = {"bbox": {"AP": 21.5, "AP50": float("nan"), "AP-star": 3.25}}
    lines = results_table(metrics).splitlines()
    assert lines[0] == "Evaluation results for bbox:"
    assert [c.strip() for c in lines[3].strip("|").split("|")] == ["21.500", "-"]
    assert lines[4] == "Per-category bbox AP:"
    assert [c.strip() for c in lines[7].strip("|").split("|")] == ["3.250"]
    assert lines[-1] == "-: there is nothing to be found, or nothing was detected at all"
    assert not results_table({"bbox": {"AP": 1.0}}).splitlines()[-1].startswith("-:")
    several = results_table({"a": metrics, "b": metrics})
    assert several.count("Evaluation results for bbox") == 2 and "Data set b" in several


class Odd(ValueError):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("\n\n  foo\nbar"), "foo"),
        (ValueError("\n \n"), "ValueError"),
        (ValueError(), "ValueError"),
        (Odd(), "Odd"),
        (KeyError("\n"), r"'\n'"),
        (ValueError("x" * 10**6), "x" * 296 + " ..."),
    ],
)
def test_reasons_of_others(error, reason):
    assert reason_of(error) == reason
