"""The hooks in a small training loop, which calls them as both hosts do."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_det import BatchNorm2d, freeze, update_bn_stats
from bn_det.errors import InputError
from bn_det.layers.renorm import RenormLimits
from bn_det.layers.tuned import TunedNorm
from bn_det.training.hooks import (
    FreezeBN,
    Hook,
    PreciseBN,
    RenormSchedule,
    TuneBN,
    VirtualBatch,
)
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), BatchNorm2d(2))


def make_batches(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [1 + torch.randn(4, 3, 5, 5, generator=generator) for _ in range(num)]


class Trainer:
    """SGD with momentum and weight decay on everything."""

    def __init__(self, model, max_iter, start=0, first_seed=100):
        self.model, self.max_iter, self.start, self.first_seed = model, max_iter, start, first_seed
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        self.hooks, self.scalars, self.iter = [], [], start

    def register(self, *hooks):
        for hook in hooks:
            hook.trainer = self
            self.hooks.append(hook)

    def put_scalars(self, scalars):
        self.scalars.append((self.iter, scalars))

    def train(self):
        self.model.train()
        self.call("before_train")
        for step in range(self.start, self.max_iter):
            self.iter = step
            self.call("before_step")
            (x,) = make_batches(1, self.first_seed + self.iter)
            self.optimizer.zero_grad()
            F.smooth_l1_loss(self.model(x), x[:, :2]).backward()
            self.optimizer.step()
            self.call("after_step")
            if self.iter % 3 == 2:  # an evaluation
                self.model.eval()
                self.model.train()
        self.call("after_train")
        return self

    def call(self, moment):
        for hook in self.hooks:
            getattr(hook, moment)()


def statistics_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def weights_of(model):
    return {k: v.clone() for k, v in model.named_parameters()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(v, right[k]) for k, v in left.items())


def test_precise_bn(caplog):
    caplog.set_level(logging.INFO)
    trainer = Trainer(make_model(), 8)
    batches = make_batches(5)
    trainer.register(PreciseBN([3, 0, 4], trainer.model, batches, num_iter=5))
    trainer.train()
    assert [iteration + 1 for iteration, _ in trainer.scalars] == [3, 4, 6, 8]
    expected = copy.deepcopy(trainer.model)
    report = update_bn_stats(expected, batches, 5)
    assert_equal(statistics_of(trainer.model), statistics_of(expected))
    last = trainer.scalars[-1][1]
    assert last["precise_bn/num_samples"] == 20 and last["precise_bn/error"] == report.error
    assert last["precise_bn/mean_shift"] > 0
    assert caplog.text.count("| layer ") == 4
    assert caplog.text.count("PreciseBN took ") == 4  # what takes time says so
    without = Trainer(make_model(), 8).train()
    assert_equal(weights_of(trainer.model), weights_of(without.model))


def test_precise_bn_of_too_few_batches():
    trainer, passes = Trainer(make_model(), 2), []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.register(PreciseBN([1], trainer.model, make_batches(3), 5))
    with pytest.raises(InputError, match="data_loader: has 3 of 5 batches"):
        trainer.train()
    assert len(passes) == 1, "the step's alone"


@pytest.mark.parametrize(
    "data_loader, num_iter, how, message",
    [
        (7, 5, {}, "data_loader: what is given is of type int"),
        ([], 0, {}, "num_iter: 0"),
        ([], 5, {"tolerance": -1}, "tolerance: -1"),
        ([], 5, {"estimator": "mean"}, "estimator: 'mean'"),
    ],
)
def test_precise_bn_refuses(data_loader, num_iter, how, message):
    with pytest.raises(InputError, match=message):
        PreciseBN([1], make_model(), data_loader, num_iter, **how)


def make_ours(**choices):
    return nn.Sequential(nn.Conv2d(3, 2, 1), BatchNorm2d(2, **choices))


def test_virtual_batches_of_layers_without_statistics():
    """These are normalized by extra images, too."""
    trainer, found = Trainer(make_ours(track_running_stats=False), 2), []
    extended = trainer.model[1]._extensions
    trainer.model.register_forward_hook(lambda *_: found.append(len(extended)))
    trainer.register(VirtualBatch(trainer.model, make_batches(2)))
    trainer.train()
    assert found == [1] * 4, "the extra images and the step's, twice"


def test_virtual_batches_that_end():
    trainer = Trainer(make_ours(), 3)
    trainer.register(VirtualBatch(trainer.model, make_batches(2)))
    with pytest.raises(InputError, match="data_loader of VirtualBatch: has ended before iteration"):
        trainer.train()


def test_precise_bn_of_a_frozen_model(caplog):
    model = make_model()
    hook = PreciseBN([1], model, make_batches(5), num_iter=5)
    hook.trainer = Trainer(model, 1)
    model.eval()
    before = statistics_of(model)
    hook.before_train()
    hook.after_step()
    assert_equal(statistics_of(model), before)
    assert "PreciseBN does nothing" in caplog.text


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("precise", [False, True])
def test_freeze(affine, precise):
    trainer = Trainer(make_model(), 10)
    hook = PreciseBN([2], trainer.model, make_batches(5), num_iter=5)
    freeze = FreezeBN(4, affine=affine, precise=hook if precise else None)
    seen = []

    class Watch(Trainer):
        """What a checkpoint after each step would hold."""

        def after_step(self):
            seen.append((statistics_of(trainer.model), weights_of(trainer.model)))

        def __getattr__(self, name):
            return lambda: None

    trainer.register(freeze, *([hook] if precise else []), Watch(trainer.model, 0))
    trainer.train()
    for statistics, _ in seen[4:]:
        assert_equal(statistics, seen[-1][0])
    if precise:
        # Of the model that the 4th step has made.
        expected = make_model()
        expected.load_state_dict({**expected.state_dict(), **seen[3][1]})
        update_bn_stats(expected.train(), make_batches(5), 5, initial=True)
        assert_equal(statistics_of(expected), seen[-1][0])
        assert [iteration for iteration, _ in trainer.scalars] == [1, 3, 4]
    else:
        assert_equal(seen[3][0], seen[4][0])
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        moved = [not torch.equal(w[name], seen[3][1][name]) for _, w in seen[4:]]
        assert not any(moved) if affine else all(moved)
    assert not torch.equal(seen[4][1]["0.weight"], seen[3][1]["0.weight"])


@pytest.mark.parametrize(
    "iteration, affine, update, warns",
    [
        (0, False, True, True),  # statistics as in a checkpoint with nothing to normalize by
        (0, True, True, False),
        (1, False, True, False),  # a step has moved them
        (1, False, False, True),
    ],
)
def test_freezing_folded_statistics_warns_once(iteration, affine, update, warns, caplog):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), BatchNorm2d(2, update_population=update))
    trainer = Trainer(model, 4)
    trainer.register(FreezeBN(iteration, affine=affine))
    trainer.train()
    assert ["variance 1: 1." in message for message in caplog.messages] == [True] * warns


@pytest.mark.parametrize("start", [4, 6])
def test_freeze_is_resumed(start):
    def run(model, max_iter, start=0, optimizer=None):
        trainer = Trainer(model, max_iter, start)
        if optimizer:
            trainer.optimizer.load_state_dict(optimizer)
        precise = PreciseBN([], model, make_batches(5), num_iter=5)
        trainer.register(FreezeBN(4, affine=True, precise=precise))
        return trainer.train()

    whole = run(make_model(), 9)
    first = run(make_model(), start)
    resumed = run(copy.deepcopy(first.model), 9, start, first.optimizer.state_dict())
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def freeze_in_ddp(rank):
    model = DistributedDataParallel(make_model(), broadcast_buffers=False)
    trainer = Trainer(model, 7, first_seed=1000 * rank)
    trainer.register(FreezeBN(3, affine=True))
    trainer.train()
    return statistics_of(model.module), weights_of(model.module)


def test_freeze_in_several_processes():
    """With their averaged statistics; the reducer gets all gradients that it waits for."""
    results = run_ranks(freeze_in_ddp, 2)
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


def test_renorm_schedule():
    """Batch normalization at first; then linear, each limit at its own rate."""
    model = nn.Sequential(*make_model(), BatchNorm2d(2, renorm=(3, 5)))
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model[-1].renorm))
    Trainer(model, 12).register(schedule := RenormSchedule(RenormLimits(3.0, 5.0), 2, 10, 6))
    schedule.trainer.train()
    expected = [(1, 0), (1, 0), (1, 0), (1.25, 1.25), (1.5, 2.5), (1.75, 3.75), (2, 5), (2.25, 5)]
    expected += [(2.5, 5), (2.75, 5), (3, 5), (3, 5)]
    assert seen == expected
    assert model[3].renorm is None


@pytest.mark.parametrize("start, number", [(0, [1, 1, 1, 2, 2]), (3, [2, 2]), (4, [2])])
def test_tuning(start, number, caplog):
    """What is frozen at the start, and the rest with it; also from where a run is resumed."""
    model = freeze(make_model(), "1")
    trainer, numbers = Trainer(model, 5, start), []

    class Counts(Hook):
        def after_step(self):
            numbers.append(sum(isinstance(m, TunedNorm) for m in model))

    trainer.register(FreezeBN(3), TuneBN(3), Counts())
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert numbers == number
    words = "Not tuned, as it is not frozen; call freeze first: 3"
    assert (words in caplog.messages) == (start < 3)
