"""Loss spikes: found by their definition, named with the layers before which weights have grown."""

import json
import logging
import math
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d
from bn_det.commands.cli import import_host
from bn_det.training import LossSpikes
from bn_det.training.spikes import FACTOR, FILE, FIRST, LEAST, WINDOW, read_spikes, spike_text
from hosts import every_host, make_cfg
from reference import BASE

pytestmark = pytest.mark.usefixtures("one_thread")


class Trainer:
    """Has losses that are given."""

    def __init__(self, model, folder):
        self.model, self.hook, self.iter, self.total_loss = model, LossSpikes(str(folder)), 0, None
        self.hook.trainer = self

    def run(self, losses, start=0, step=lambda trainer: None):
        self.iter = start
        self.hook.before_train()
        for self.iter, self.total_loss in enumerate(losses, start):
            step(self)
            self.hook.after_step()
        assert self.hook.path.is_file(), "from the first iteration on"
        return read_spikes(self.hook.path.parent)


def make_trainer(folder, model=None):
    return Trainer(model or nn.Sequential(nn.BatchNorm2d(2)), folder)


def by_definition(losses):
    """The largest loss over the median of those before it, and where."""
    return max(
        (loss / median(losses[max(FIRST, k - WINDOW) : k]), k)
        for k, loss in enumerate(losses)
        if k >= FIRST + LEAST
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_is_that_of_the_definition(tmp_path, seed):
    losses = torch.rand(200, generator=torch.Generator().manual_seed(seed)).add(0.6).tolist()
    noted = make_trainer(tmp_path).run(losses)
    ratio, where = by_definition(losses)
    assert noted["largest"]["iteration"] == where and noted["spikes"] == []
    assert math.isclose(noted["largest"]["ratio"], ratio)


def test_a_spike_is_told_once_when_it_begins(tmp_path, caplog):
    usual = [1.0] * 60
    told = []

    def step(trainer):
        told.append(len(caplog.records))

    with caplog.at_level(logging.WARNING):
        high = [1.01 * FACTOR] * 5
        noted = make_trainer(tmp_path).run([*usual, *high, *usual, *high], step=step)
    assert [spike["iteration"] for spike in noted["spikes"]] == [60, 125]
    assert told[60:62] == [0, 1] and told[-1] == len(caplog.records) == 2
    assert "at iteration 60" in caplog.messages[0]
    assert f"{noted['largest']['ratio']:.2f}" == f"{1.01 * FACTOR:.2f}"


def test_what_is_no_spike(tmp_path):
    """A loss that grows as slowly as the median can follow, one just below, and the first ones."""
    slow = [1.01**k for k in range(300)]
    assert make_trainer(tmp_path).run(slow)["spikes"] == []
    below = [1.0] * 60 + [0.99 * FACTOR]
    assert make_trainer(tmp_path).run(below)["spikes"] == []
    first = [0.01] * FIRST + [1.0] * (LEAST + 5)
    assert make_trainer(tmp_path).run(first)["spikes"] == []
    nothing = {"largest": None, "spikes": []}  # and none is left of others
    assert make_trainer(tmp_path).run([1.0] * (FIRST + LEAST)) == nothing
    assert make_trainer(tmp_path).run([0.0] * 60 + [1.0]) == nothing, "no median to be above of"


def test_the_layers_that_have_grown_are_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)),
        *(nn.Conv2d(3, 3, 1, bias=False), BatchNorm2d(3)),
    )

    def step(trainer):
        if trainer.iter == 55:
            with torch.no_grad():
                model[2].weight.mul_(10)
        model(torch.randn(64, 3, 4, 4))

    for _ in range(100):
        model(torch.randn(64, 3, 4, 4))
    noted = make_trainer(tmp_path, model).run([1.0] * 59 + [10.0], step=step)
    ((name, growth),) = noted["spikes"][0]["layers"].items()
    assert name == "3"
    # An EMA of momentum 0.1 has seen the hundredfold variance five times.
    assert growth == pytest.approx(0.9**5 + 100 * (1 - 0.9**5), rel=0.2)
    assert spike_text(noted["spikes"][0]).endswith(f"have grown: 3 {growth:.3g} times")


def test_models_without_statistics(tmp_path):
    noted = make_trainer(tmp_path, nn.GroupNorm(1, 2)).run([1.0] * 60 + [9.0])
    assert noted["spikes"][0]["layers"] == {}
    assert "No variance has grown" in spike_text(noted["spikes"][0])


def test_a_resumed_training_keeps_what_was_noted(tmp_path):
    """Also of what is not compared again: LEAST losses after a checkpoint begin a median."""
    losses = [1.0] * 60 + [5.0] + [1.0] * 60 + [4.0] + [1.0] * 60 + [6.0] + [1.0] * 9
    whole = make_trainer(tmp_path).run(losses)
    assert [spike["iteration"] for spike in whole["spikes"]] == [60, 121, 182]
    for start in (140, 110):
        noted = make_trainer(tmp_path).run([1.0] * 30, start=start)
        assert [spike["iteration"] for spike in noted["spikes"]] == [60, 121]
        assert noted["largest"] == {k: v for k, v in whole["spikes"][0].items() if k != "layers"}
    for start in (50, 41):
        noted = make_trainer(tmp_path).run([1.0] * 30, start=start)
        assert [spike["iteration"] for spike in noted["spikes"]] == [60]
    for _ in range(2):
        early = make_trainer(tmp_path).run([1.0] * 10, start=40)
        assert early == {"largest": None, "spikes": []}
    fresh = make_trainer(tmp_path).run([1.0] * 60)
    assert fresh["spikes"] == [] and fresh["largest"]["ratio"] == 1.0
    assert json.loads((tmp_path / FILE).read_text()) == fresh


@pytest.mark.parametrize("start", [55, 60, 61, 75])
def test_a_leap_is_told_wherever_a_training_is_resumed(tmp_path, start):
    losses = [1.0] * 60 + [5.0] + [1.0] * 60
    whole = make_trainer(tmp_path).run(losses)
    make_trainer(tmp_path).run(losses[: start + 15])
    assert make_trainer(tmp_path).run(losses[start:], start=start) == whole


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite(tmp_path, bad):
    """They leave what is known as it is, and what is noted is JSON."""
    losses = [1.0] * 50 + [bad] * 3 + [1.0] * 10 + [9.0, bad]
    noted = make_trainer(tmp_path).run(losses)
    assert noted["largest"]["ratio"] == 9.0 and noted["spikes"][0]["iteration"] == 63
    assert "NaN" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize("kind", [torch.tensor, np.float32])
def test_losses_of_other_types(tmp_path, kind):
    noted = make_trainer(tmp_path).run([kind(loss) for loss in [1.0] * 60 + [4.0]])
    assert noted["spikes"][0]["loss"] == 4.0


@pytest.mark.parametrize("period", [2, 5, 20, 30])
def test_losses_that_are_known_now_and_then(tmp_path, period):
    """As with Detectron2's gather_metric_period."""
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=1.0))

    def step(trainer):
        if (trainer.iter + 1) % period:
            trainer.total_loss = None
        size = 10 if trainer.iter >= 80 * period - 5 else 1
        model(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) * size)

    losses = [1.0] * (80 * period - 1) + [9.0]
    noted = make_trainer(tmp_path, model).run(losses, step=step)
    assert [spike["iteration"] for spike in noted["spikes"]] == [80 * period - 1]
    assert noted["spikes"][0]["layers"]["0"] == pytest.approx(100, rel=0.01)


def test_what_has_no_ratio_of_variances(tmp_path):
    """A channel that was dead, one that becomes infinite, and a layer that is another one now."""
    model = nn.ModuleDict({name: nn.BatchNorm2d(1) for name in ("dead", "wild", "other")})
    model["dead"].running_var.zero_()

    def step(trainer):
        if trainer.iter == 59:
            model["dead"].running_var.fill_(1e-6)
            model["wild"].running_var.fill_(math.inf)
            model["other"] = nn.GroupNorm(1, 1)

    noted = make_trainer(tmp_path, model).run([1.0] * 59 + [10.0], step=step)
    (spike,) = noted["spikes"]
    assert spike["layers"] == {"wild": None}
    assert spike_text(spike).endswith("have grown: wild to infinity")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"largest": 1, "spikes": []}',
             '{"largest": null, "spikes": [{}]}']
)  # fmt: skip
def test_a_damaged_file(tmp_path, text, caplog):
    """A training goes on, and says so; whoever reads it is told."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError):
        read_spikes(tmp_path)
    noted = make_trainer(tmp_path).run([1.0] * 30 + [4.0], start=100)
    assert "cannot be read, and begins anew" in caplog.text
    assert [spike["iteration"] for spike in noted["spikes"]] == [130]
    (tmp_path / FILE).write_text(text)
    assert make_trainer(tmp_path).run([1.0] * 60)["spikes"] == []


HEADS = {
    "torchvision": ("head.classification_head.conv", "head.classification_head.cls_logits"),
    "detectron2": ("head.cls_subnet", "head.cls_score"),
}


@every_host
def test_a_training(host, tiny_shapes, tmp_path, caplog):
    """The convolution before a BatchNorm grows, and the loss leaps."""
    cfg = make_cfg(
        *(host, BASE, *tiny_shapes, "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)),
        *("INPUT.MIN_SIZE_TRAIN", "(32,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "53"),
        *("SOLVER.BASE_LR", "1e-4", "SOLVER.CHECKPOINT_PERIOD", "100"),
    )
    train = import_host(host, "train")
    if host == "detectron2":
        train.register_datasets(cfg)
    trainer = train.Trainer(cfg)
    tower, last = (trainer.model.get_submodule(name) for name in HEADS[host])
    losses = []

    def grow(*_):
        losses.append(None)
        if len(losses) == 52:
            with torch.no_grad():
                tower[0].weight.mul_(100)
                last.bias.add_(5)

    trainer.model.register_forward_pre_hook(grow)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (spike,) = read_spikes(tmp_path)["spikes"]
    assert spike["iteration"] == 51 and f"{HEADS[host][0]}.1" in next(iter(spike["layers"]))
    assert spike_text(spike) in caplog.text
