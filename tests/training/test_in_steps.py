"""What the monitor tells of steps, modes and normalization batches; and of none that is healthy."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bn_det
from bn_det import BatchNorm2d, freeze
from bn_det.training import Hook, Monitor
from bn_det.training.hooks import FreezeBN, PreciseBN, VirtualBatch
from ranks import run_ranks
from training_loop import (
    MODELS,
    Levels,
    Trainer,
    convolutions,
    hooks_of,
    make_batch,
    still,
    warned,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def told(caplog):
    """The messages of a rule, and how severe they are."""
    caplog.set_level(logging.INFO, "bn_det")

    def messages(start):
        return [(r.levelname, m) for r in caplog.records if (m := r.getMessage()).startswith(start)]

    return messages


def small_batch(size):
    return lambda step: make_batch(step)[:size]


class Reentrant(nn.Sequential):
    """Its first forward pass is without gradients."""

    def forward(self, x):
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


class CheckpointedLevels(Levels):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Probing(Trainer):
    """Runs the model without gradients in each step, in training mode unless it is told to."""

    mode = True

    def losses_of(self, model, x):
        with torch.no_grad():
            model.train(self.mode)(x + 1)
        return super().losses_of(model.train(), x)


REPEATED = "activation checkpointing has updated the EMA again"
PROBED = "a forward pass without gradients, in training mode"
FAULTS = {
    "checkpointed": (Trainer, MODELS["checkpointed"], 1, 2, REPEATED),
    "checkpointed, accumulated": (Trainer, MODELS["checkpointed"], 2, 4, REPEATED),
    "reentrant": (Trainer, lambda: convolutions(nn.BatchNorm2d, Reentrant), 1, 2, REPEATED),
    "levels": (Trainer, lambda: CheckpointedLevels(nn.BatchNorm2d(4)), 1, 6, REPEATED),
    "probe": (Probing, MODELS["torch"], 1, 2, PROBED),
    "probe of ours": (Probing, MODELS["ours"], 1, 2, PROBED),
    "ours, checkpointed, and a probe": (Probing, MODELS["ours, checkpointed"], 1, 2, PROBED),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_ema_that_moves_more_often_than_the_optimizer_steps(kind, told):
    trainer_class, make, num_batches, number, words = FAULTS[kind]
    trainer = trainer_class(make(), 16, Monitor(8), num_batches=num_batches).train()
    ((level, message),) = told("BN503")
    assert level == "WARNING" and words in message and f"up to {number} times a step" in message
    counters = [b for n, b in trainer.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert max(map(int, counters)) == 16 * number
    moved = 1 - 0.9**number  # of a momentum of 0.1
    assert f"an EMA of momentum 0.1 forgets, a step, as one of {moved:.2g}" in message


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "checkpointed"])
def test_a_healthy_training(kind, told):
    """Not even where levels share a layer; that is BN202's."""
    Trainer(MODELS[kind](), 16, Monitor(8)).train()
    assert told("BN50") == []


def test_accumulated_batches_are_a_note(told):
    models = [MODELS[kind]() for kind in ("torch", "ours, checkpointed", "levels of torch")]
    for model in (*models, convolutions(BatchNorm2d, Reentrant)):
        Trainer(model, 16, Monitor(8), num_batches=3).train()
    messages = told("BN50")
    assert [level for level, _ in messages] == ["INFO"] * 4
    assert all(": 3 passes a step, each with a norm" in message for _, message in messages)


def test_probes_that_leave_statistics_alone(told):
    """In evaluation mode, guarded, or as extra images."""
    trainer = Probing(MODELS["torch"](), 16, Monitor(8))
    trainer.mode = False
    trainer.train()
    model = MODELS["ours"]()
    extra = VirtualBatch(model, [make_batch(k)[:2] for k in range(16)])
    trainer = Trainer(model, 16, Monitor(8), extra)
    trainer.batch = small_batch(2)
    trainer.train()
    assert told("BN50") == []


class Between(Hook):
    """Does something after some steps, and what trainers do before the next."""

    def __init__(self, do, *iterations):
        self.do, self.iterations = do, iterations

    def after_step(self):
        if self.trainer.iter in self.iterations:
            self.do(self.trainer.model)


def look_at(model, mode, number=3):
    model.train(mode)
    with torch.no_grad():
        for k in range(number):
            model(make_batch(k))
    model.train()


@pytest.mark.parametrize("iteration", [21, 37], ids=["between looks", "in one"])
def test_an_evaluation_in_training_mode(iteration, told):
    """Its batches are counted: between the steps of a look, and between looks."""
    validate = Between(lambda model: look_at(model, True), iteration)
    Trainer(MODELS["torch"](), 80, Monitor(20), validate).train()
    ((level, message),) = told("BN50")
    assert level == "WARNING" and "at iteration 39" in message
    assert "2 layers updated between steps, 1 by 3 batches: passes in training mode" in message


def test_what_may_happen_between_steps(told):
    """Evaluation in its mode, ours that recompute or freeze, a guard, and a step that fails."""
    model = MODELS["torch"]()
    batches = [make_batch(k) for k in range(5)]

    def guarded(model):
        with bn_det.no_population_update(model):
            look_at(model, True)

    others = [
        Between(lambda model: look_at(model, False), 5, 21, 37),
        Between(guarded, 6, 22, 38),
        PreciseBN([30], model, batches, num_iter=5),
    ]
    Trainer(model, 60, Monitor(20), *others).train()
    hook = Monitor(20)
    trainer = Trainer(MODELS["ours"](), 60, hook)
    hook.trainer = trainer
    for trainer.iter in range(60):
        if trainer.iter in (25, 37):
            hook.before_step()
        else:
            trainer.step()
    assert told("BN50") == []


def test_a_mode_that_an_evaluation_has_left(told):
    trainer = Trainer(MODELS["torch"](), 100, Monitor(20), Between(lambda m: m.eval(), 45))
    trainer.train()
    ((level, message),) = told("BN50")
    assert level == "WARNING" and message.startswith("BN505 at iteration 79: ")
    assert "2 layers had moved before, and stand still: they are in evaluation mode" in message
    assert int(trainer.model[1].num_batches_tracked) == 46


def test_a_part_that_train_thaws(told):
    """One eval() of it, which the next epoch undoes."""

    class Part(Trainer):
        def step(self):
            if self.iter == 0:
                self.model[1].eval()
            super().step()

    Part(MODELS["torch"](), 60, Monitor(20), Between(lambda model: model.train(), 25)).train()
    ((_, message),) = told("BN50")
    assert message.startswith("BN505 at iteration 39: ") and ", in 1: " in message
    assert "had stood still, in evaluation mode, and move again" in message


def test_a_model_that_is_trained_in_evaluation_mode(told):
    class Evaluated(Trainer):
        def step(self):
            self.model.eval()
            super().step()

    Evaluated(MODELS["levels of torch"](), 40, Monitor(20)).train()
    ((_, message),) = told("BN50")
    assert message.startswith("BN505 at iteration 19: ")
    assert "1 layer stand still: the model is trained in evaluation mode" in message
    Evaluated(freeze(MODELS["torch"]()), 40, Monitor(20)).train()
    assert len(told("BN50")) == 1


def test_layers_that_are_meant_to_stand_still(told):
    """Frozen from a step on, without an EMA that moves, or in evaluation mode all the time."""

    class Part(Trainer):
        def step(self):
            self.model[1].eval()
            super().step()

    Trainer(MODELS["torch"](), 60, Monitor(20), FreezeBN(25)).train()
    Trainer(MODELS["half frozen"](), 60, Monitor(20), FreezeBN(25, affine=True)).train()
    Trainer(
        convolutions(lambda c: BatchNorm2d(c, update_population=False)), 40, Monitor(20)
    ).train()
    Part(MODELS["torch"](), 40, Monitor(20)).train()
    assert told("BN50") == []


def test_a_small_normalization_batch(told):
    for size, num_batches in ((3, 1), (2, 1), (1, 4)):
        trainer = still(MODELS["torch"](), 8, Monitor(4), num_batches=num_batches)
        trainer.batch = small_batch(size)
        before = hooks_of(trainer.model)
        trainer.train()
        assert hooks_of(trainer.model) == before
    messages = [message for _, message in told("BN502")]
    assert len(messages) == 2 and all(", in 1 and 1 more: the norm" in m for m in messages)
    assert "the normalization batch of 2 layers is of 2 samples: " in messages[0]
    where = "of 2 layers is of 1 sample, where a step of the optimizer has 4 of these: "
    assert where in messages[1]


@pytest.mark.parametrize("kind", ["random ghosts", "renorm", "population", "half frozen"])
def test_small_batches_that_are_a_choice(kind, told):
    trainer = still(MODELS[kind](), 8, Monitor(4))
    trainer.batch = small_batch(2)
    trainer.train()
    messages = [message for _, message in told("BN502")]
    assert len(messages) == (kind == "half frozen")
    assert all(", in 4: the normalization batch of 1 layer is" in m for m in messages)


def train_ranks(rank, kind):
    torch.manual_seed(0)
    records = warned()
    model = DistributedDataParallel(MODELS[kind](), broadcast_buffers=False)
    trainer = Trainer(model, 8, Monitor(4))
    trainer.batch = lambda step: make_batch(2 * step + rank)[:2]
    trainer.train()
    return records


def test_a_small_batch_on_each_of_two_ranks():
    """Together they have four samples: for SyncBN enough."""
    for messages in run_ranks(train_ranks, 2, "torch"):
        (message,) = [m for m in messages if m.startswith("BN502")]
        assert "a step of the optimizer has 2 of these" in message and "SyncBN, or" in message
    assert run_ranks(train_ranks, 2, "sync") == [[], []]
