"""Our Trainer in several processes on the CPU, where DefaultTrainer does not start."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy

import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from bn_det.config.load import load_config
from bn_det.d2 import add_bn_det_config, register_datasets
from bn_det.d2.train import Trainer
from ranks import run_ranks
from reference import BASE


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), *tiny_shapes),
        *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "0"),
    ]


def make_trainer(opts):
    comm.create_local_process_group(2)
    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, BASE, opts, "Detectron2")
    register_datasets(cfg)
    return Trainer(cfg)


class Record(HookBase):
    """Keeps the model before the first step, what the step reads, and the weights after it."""

    def before_train(self):
        self.model = copy.deepcopy(self.trainer.model.module)
        batches = self.trainer._trainer.data_loader
        self.batch = next(iter(batches))
        self.trainer._trainer._data_loader_iter_obj = iter([self.batch, self.batch])

    def after_step(self):
        if self.trainer.iter == 0:
            self.weights = copy.deepcopy(dict(self.trainer.model.module.named_parameters()))


def train(rank, opts):
    trainer = make_trainer([*opts, "DATASETS.TEST", "()"])
    trainer.register_hooks([hook := Record()])
    trainer.train()
    batches = comm.gather(hook.batch)
    expected = {}
    if rank == 0:
        # Each rank divides its loss by its own running mean of positive anchors.
        optimizer = build_optimizer(trainer.cfg, hook.model)
        for batch in batches:
            model = copy.deepcopy(hook.model)
            with EventStorage():
                (sum(model(batch).values()) / 2).backward()
            for p, q in zip(hook.model.parameters(), model.parameters(), strict=True):
                p.grad = q.grad if p.grad is None else p.grad + q.grad
        optimizer.step()
        expected = dict(hook.model.named_parameters())
    ids = [d["image_id"] for d in hook.batch]
    return ids, hook.weights, expected, dict(trainer.model.module.named_parameters())


def test_gradients_are_the_mean_of_the_ranks(opts, tmp_path):
    (ids, weights, expected, last), (other_ids, other_weights, _, other_last) = run_ranks(
        train, 2, opts
    )
    assert len(ids) == len(other_ids) == 2 and set(ids).isdisjoint(other_ids)
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name
        assert torch.equal(last[name], other_last[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(weights) <= set(saved["model"])
    for name, value in last.items():
        assert torch.equal(value, saved["model"][name]), name


class Fail(HookBase):
    def before_step(self):
        if comm.get_rank() == 1 and self.trainer.iter == self.trainer.max_iter - 1:
            raise ArithmeticError("this is what went wrong")


def train_and_fail(rank, opts):
    trainer = make_trainer(opts)
    trainer.register_hooks([Fail()])
    with pytest.raises(ArithmeticError if rank == 1 else RuntimeError):
        trainer.train()


def test_failure_in_the_last_iteration_is_no_reason_to_evaluate(opts):
    """EvalHook would do so, and wait for ranks that are still in that iteration."""
    run_ranks(train_and_fail, 2, opts, stay=False)


def population(rank, opts):
    trainer = make_trainer([*opts, "DATASETS.TEST", "()"])
    trainer.train()
    return {k: b for k, b in trainer.model.module.named_buffers() if "running" in k}


@pytest.mark.parametrize("averaged", [True, False])
def test_every_rank_has_the_statistics_that_are_saved(averaged, opts, tmp_path):
    opts = [*opts, "SOLVER.AVERAGE_BN_STATISTICS", str(averaged)]
    first, second = run_ranks(population, 2, opts)
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    assert all(torch.equal(b, saved[k]) for k, b in first.items())
    assert all(torch.equal(b, saved[k]) for k, b in second.items()) == averaged
