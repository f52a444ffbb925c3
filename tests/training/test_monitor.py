"""The monitor in a small training loop: what it writes, what it warns of, what it leaves alone."""

import copy
import logging
import math
import re
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_det import freeze
from bn_det.errors import InputError
from bn_det.layers.kinds import unwrapped
from bn_det.population.average import average_population_statistics
from bn_det.training import Monitor
from bn_det.training.hooks import FreezeBN, PreciseBN, VirtualBatch
from old_torch import not_on_torch_2_4
from ranks import run_ranks
from training_loop import MODELS, Levels, Trainer, hooks_of, make_batch, still, warned

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(trainer):
    model = unwrapped(trainer.model)
    return {**copy.deepcopy(model.state_dict()), "losses": torch.tensor(trainer.losses).double()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_training_is_the_same(kind, dtype):
    """To the bit: losses, weights, statistics and random numbers."""

    def train(*hooks):
        torch.manual_seed(0)
        trainer = Trainer(MODELS[kind](), 12, *hooks)
        trainer.dtype = dtype
        before = hooks_of(trainer.model)
        trainer.train()
        assert hooks_of(trainer.model) == before
        return trainer, state_of(trainer), torch.get_rng_state()

    _, expected, random_state = train()
    trainer, state, other_random_state = train(Monitor(4))
    assert_same(state, expected)
    assert torch.equal(other_random_state, random_state)
    assert [iteration for iteration, _ in trainer.scalars] == [3, 7, 11]
    for _, scalars in trainer.scalars:
        assert {"bn_monitor/staleness", "bn_monitor/noise"} <= scalars.keys()
        assert all(map(math.isfinite, scalars.values()))
        assert scalars["bn_monitor/non_finite"] == 0


def test_beside_other_hooks():
    """Those that freeze in a window, run extra images and recompute; the training is theirs."""

    def train(*hooks):
        model = MODELS["levels in a list"]()
        batches = [make_batch(k) for k in range(50)]
        virtual = VirtualBatch(model, batches)
        precise = PreciseBN([3], model, batches, num_iter=5)
        torch.manual_seed(0)
        others = FreezeBN(9, precise=precise), virtual, *hooks, precise
        return state_of(Trainer(model, 12, *others).train())

    torch.manual_seed(0)
    expected = train()
    torch.manual_seed(0)
    assert_same(train(Monitor(6)), expected)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def last(trainer, name):
    return trainer.scalars[-1][1][f"bn_monitor/{name}"]


@pytest.mark.parametrize("kind", ["levels of torch", "levels of ours", "levels in a list"])
def test_levels_that_differ(kind, caplog):
    """The share is that of their values, and it is told once."""
    torch.manual_seed(0)
    trainer = still(MODELS[kind](), 96, Monitor(16)).train()
    (message,) = warnings_of(caplog)
    assert message.startswith(
        "BN202 at iteration 15: levels or sources that differ share one set of statist"
    )
    assert "in norm: 1 layer called several times a pass (norm 3 times)" in message
    assert message.endswith("More: bn-det doctor --explain BN202")
    model = MODELS["levels of torch"]()
    model.load_state_dict(trainer.model.state_dict())
    inputs = []
    model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for k in range(80, 96):
        model(make_batch(k))
    rows = [x.transpose(0, 1).flatten(1) for x in inputs]
    whole, within = torch.cat(rows, 1), torch.cat([r - r.mean(1, keepdim=True) for r in rows], 1)
    share = (1 - within.var(1) / whole.var(1)).mean()
    assert share > 0.3 and abs(last(trainer, "between_share") - share) < 0.05


def test_levels_that_do_not_differ_are_noise(caplog):
    """So small that each has a mean of its own in every batch."""

    class Alike(Levels):
        def forward(self, x):
            return sum(self.norm(part).mean() for part in self.conv(x).split(1, 2))

    torch.manual_seed(0)
    trainer = still(Alike(nn.BatchNorm2d(4)), 400, Monitor(16)).train()
    shares = torch.tensor([scalars["bn_monitor/between_share"] for _, scalars in trainer.scalars])
    assert len(shares) == 25 and shares.mean() < 0.02 and not warnings_of(caplog)


def test_passes_are_no_levels():
    """Of an accumulated batch, nor is what activation checkpointing repeats."""
    torch.manual_seed(0)
    for make in (MODELS["torch"], MODELS["ours"], MODELS["checkpointed"]):
        trainer = Trainer(make(), 8, Monitor(4), num_batches=2).train()
        assert all("bn_monitor/between_share" not in scalars for _, scalars in trainer.scalars)


def test_levels_of_accumulated_passes(caplog):
    torch.manual_seed(0)
    once = still(MODELS["levels of torch"](), 32, Monitor(16)).train()
    torch.manual_seed(0)
    more = still(MODELS["levels of torch"](), 32, Monitor(16), num_batches=2).train()
    assert "(norm 3 times)" in warnings_of(caplog)[-1]
    assert abs(last(once, "between_share") - last(more, "between_share")) < 0.05


def test_stale_statistics(caplog):
    """Of an EMA that forgets too slowly; told once, and not while a new layer's values are left."""
    torch.manual_seed(0)
    model = MODELS["torch"]()
    model[1].momentum = 1e-4
    model[1].running_mean += 5
    trainer = still(model, 240, Monitor(40)).train()
    (message,) = warnings_of(caplog)
    assert message.startswith("BN201 at iteration 119: statistics do not fit the weights, in 1: ")
    with torch.no_grad():
        x = torch.cat([model[0](make_batch(k)) for k in range(224, 240)])
    # the EMA has moved by 2 % since
    shift = (model[1].running_mean - x.mean((0, 2, 3))) / x.var((0, 2, 3)).sqrt()
    assert shift.square().mean().sqrt() == pytest.approx(last(trainer, "staleness"), rel=0.02)


def test_healthy_layers_are_not_told_of(caplog):
    """Staleness is what chance does not explain, and the noise is that of the batches' means."""
    torch.manual_seed(0)
    caplog.set_level(logging.INFO)
    trainer = still(MODELS["torch"](), 800, Monitor(16)).train()
    assert not warnings_of(caplog) and len(trainer.scalars) == 50
    stale = torch.tensor([s["bn_monitor/staleness"] for k, s in trainer.scalars if k > 100])
    noise = torch.tensor([s["bn_monitor/noise"] for k, s in trainer.scalars])
    with torch.no_grad():
        xs = [trainer.model[0](make_batch(k)) for k in range(200)]
    means = torch.stack([x.mean((0, 2, 3)) for x in xs])
    expected = (means.var(0) / torch.cat(xs).var((0, 2, 3))).mean().sqrt()
    assert stale.median() < 0.3 * expected
    assert noise.square().mean().sqrt() == pytest.approx(float(expected), rel=0.3)
    assert re.search(r"BatchNorm: staleness \S+ \(\d\), noise \S+ \(\d\)$", caplog.text, re.M)


@pytest.mark.parametrize("name", ["running_var", "weight"])
def test_values_that_are_not_finite(name, caplog):
    torch.manual_seed(0)
    model = MODELS["torch"]()
    with torch.no_grad():
        getattr(model[4], name)[1] = math.nan
        getattr(model[1], name)[:2] = math.inf
    trainer = still(model, 8, Monitor(4))
    trainer.optimizer.step = lambda: None  # or all weights are NaN in the next one
    trainer.train()
    (message,) = warnings_of(caplog)
    assert message.startswith("BN107 at iteration 3: ") and ", in 1 and 1 more: 2 values" in message
    # infinite weights make NaN of what comes after
    numbers = [scalars["bn_monitor/non_finite"] for _, scalars in trainer.scalars]
    assert numbers == ([3, 3] if name == "running_var" else [5, 5])
    for _, scalars in trainer.scalars:
        assert all(map(math.isfinite, scalars.values()))


def test_of_a_training_that_fails_it_is_said_what_is_not_finite(caplog):
    """Nothing is left in the model."""

    def batch(step):
        if step == 6:
            raise FloatingPointError("loss not finite")
        return make_batch(step) * (math.inf if step == 5 else 1)

    model = MODELS["levels of torch"]()
    before = hooks_of(model)
    trainer = Trainer(model, 12, Monitor(4))
    trainer.batch = batch
    with pytest.raises(FloatingPointError):
        trainer.train()
    (message,) = [m for m in warnings_of(caplog) if m.startswith("BN107")]
    assert message.startswith("BN107 at iteration 6: ") and ", in norm: " in message
    assert hooks_of(model) == before


def test_a_loop_that_goes_on_after_a_step_that_failed():
    """In such a one nothing calls after_step."""
    torch.manual_seed(0)
    model = MODELS["levels in a list"]()
    before = hooks_of(model)
    trainer = Trainer(model, 12, hook := Monitor(4))
    hook.trainer = trainer
    for trainer.iter in range(8):
        if trainer.iter == 5:
            hook.before_step()
        else:
            trainer.step()
    assert hooks_of(model) == before
    assert len(trainer.scalars) == 2 and math.isfinite(last(trainer, "noise"))


def test_models_without_statistics():
    trainer = Trainer(nn.Conv2d(3, 1, 1), 8, Monitor(4)).train()
    assert trainer.scalars == []
    frozen = MODELS["torch"]()
    freeze(frozen)
    trainer = Trainer(frozen, 8, Monitor(4)).train()
    assert [s for _, s in trainer.scalars] == [{"bn_monitor/non_finite": 0.0}] * 2


@not_on_torch_2_4("trains no graph with statistics that move, where the backend leaves it as it is")
def test_a_compiled_model_is_not_compiled_anew():
    def graphs(*hooks):
        torch._dynamo.reset()
        compiled = []

        def backend(graph, _):
            compiled.append(graph)
            return graph.forward

        torch.manual_seed(0)
        trainer = Trainer(torch.compile(MODELS["levels of ours"](), backend=backend), 12, *hooks)
        return trainer.train().scalars, len(compiled)

    _, expected = graphs()
    scalars, number = graphs(Monitor(4))
    assert number == expected > 0
    assert scalars[-1][1]["bn_monitor/noise"] > 0


@pytest.mark.parametrize("period", [1, 2.5, "a"])
def test_what_is_no_period(period):
    words = f"period: {period!r} is not accepted; use 2 iterations or more, an integer"
    with pytest.raises(InputError, match=words):
        Monitor(period)


def test_a_period_of_numpy():
    assert Monitor(np.int64(2)).period == 2


def train_ranks(rank, kind, with_monitor, gap=0.0, broken=False, max_iter=48):
    """A training in which each rank has batches, a layer of its own statistics, and a gap."""
    torch.manual_seed(0)
    records = warned()
    model = DistributedDataParallel(MODELS[kind](), broadcast_buffers=False)
    if rank == 1 and broken:
        model.module[1].running_var[0] = math.inf
    trainer = Trainer(model, max_iter, *([Monitor(16)] if with_monitor else []))
    trainer.batch = lambda step: make_batch(2 * step + rank) + gap * rank
    trainer.train()
    return state_of(trainer), trainer.scalars, records


@pytest.mark.parametrize("kind", ["torch", "sync", "levels in a list"])
def test_ranks_train_as_without_it(kind):
    of_ranks = run_ranks(train_ranks, 2, kind, True)
    expected = run_ranks(train_ranks, 2, kind, False)
    for (state, scalars, records), (without, *_) in zip(of_ranks, expected, strict=True):
        assert_same(state, without)
        assert len(scalars) == 3 and not any("BN204" in r for r in records)
    spreads = [{s["bn_monitor/rank_spread"] for _, s in scalars} for _, scalars, _ in of_ranks]
    if kind == "sync":
        assert spreads == [{0.0}, {0.0}]
    else:
        assert 0 < max(spreads[0]) < 0.2


def test_ranks_that_differ():
    """By data of their own, and by an infinite value on one alone; rank 0 knows of both."""
    for state, scalars, records in run_ranks(train_ranks, 2, "torch", True, 5.0):
        (message,) = [r for r in records if r.startswith("BN204")]
        assert message.startswith("BN204 at iteration 15: each rank has statistics of its own, in ")
        assert scalars[-1][1]["bn_monitor/rank_spread"] > 1 and len(state) > 5
    (_, scalars, records), _ = run_ranks(train_ranks, 2, "torch", True, 0.0, True, 16)
    assert scalars[-1][1]["bn_monitor/non_finite"] == 1
    assert any(r.startswith("BN107 at iteration 15") for r in records)


def fail_on_one_rank(rank):
    def batch(step):
        if rank == 1 and step == 6:
            raise ValueError("bad image")
        return make_batch(step)

    model = DistributedDataParallel(MODELS["torch"](), broadcast_buffers=False)
    trainer = Trainer(model, 8, Monitor(2))
    trainer.batch = batch
    start = time.monotonic()
    try:
        trainer.train()
    except Exception as e:
        return type(e).__name__, time.monotonic() - start
    return "", 0.0


def test_a_rank_that_fails_leaves_none_waiting():
    (other, seconds), (failed, _) = run_ranks(fail_on_one_rank, 2, stay=False)
    assert failed == "ValueError" and other == "RuntimeError" and seconds < 50


def test_a_first_look_that_fails():
    """The training ends with what failed, and not with what its end fails with."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, device="meta"))
    monitor = Monitor(2)
    monitor.trainer = Trainer(model, 2)
    monitor.trainer.iter = 0
    with pytest.raises(NotImplementedError, match="meta"):
        monitor.before_step()
    monitor.after_train()


def averaged(rank):
    """After ranks were averaged they are equal, and the moves between steps are none of a batch."""
    torch.manual_seed(0)

    class Average(Monitor):
        def after_step(self):
            average_population_statistics(self.trainer.model)

        before_step = after_train = lambda self: None

    model = DistributedDataParallel(MODELS["torch"](), broadcast_buffers=False)
    trainer = Trainer(model, 16, Monitor(8), Average())
    trainer.batch = lambda step: make_batch(2 * step + rank)
    trainer.train()
    return trainer.scalars


def test_what_happens_between_steps_is_no_batch():
    for scalars in run_ranks(averaged, 2):
        assert scalars[-1][1]["bn_monitor/noise"] < 0.3
