"""The torchvision host in several processes: what is the same, and what is shared out."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bn_det.config.load import load_config
from bn_det.tv import get_cfg
from bn_det.tv.data import build_train_loader
from bn_det.tv.trainer import Trainer, load_datasets
from bn_det.tv.trainer import test as evaluate
from ranks import run_ranks
from reference import BASE, norm_opts

# As each of the ranks has, for sums of the same bits.
pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = ["before_train", *["before_step", "after_step"] * 4, "after_train"]


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    """Four iterations, without any norm that has a batch."""
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "SEED", "3", *tiny_shapes),
        *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.001"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.001"),
        *("DATASETS.TEST", "()", *norm_opts("GN")),
    ]


def make_cfg(opts):
    cfg = get_cfg()
    load_config(cfg, BASE, opts, "torchvision")
    return cfg


class Draw:
    """A hook that draws from the random state, and notes what it is called for."""

    def __init__(self):
        self.calls, self.iters, self.drawn = [], [], []

    def __getattr__(self, name):
        if not name.startswith(("before_", "after_")):
            raise AttributeError(name)
        self.calls.append(name)
        self.iters.append(self.trainer.iter)
        return lambda: name == "after_step" and self.drawn.append(torch.rand(1).item())


def as_doubles(model, args):
    images, *targets = args
    return [image.double() for image in images], *targets


def train(opts, resume=False):
    """In float64: in float32 rounding alone moves weights by 1e-5, on some processors."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        trainer = Trainer(make_cfg(opts))
        trainer.model.register_forward_pre_hook(as_doubles)
        trainer.register_hooks([hook := Draw()])
        trainer.resume_or_load(resume)
        trainer.train()
    finally:
        torch.set_default_dtype(usual)
    return hook, trainer.model.state_dict()


def train_twice(rank, opts, folder):
    """A whole run, and one that continues it as after a kill between iterations 1 and 2."""
    whole, weights = train(opts)
    dist.barrier()
    if rank == 0:
        (folder / "last_checkpoint").write_text("model_0000001.pth")
    dist.barrier()
    torch.manual_seed(99)
    rest, resumed = train(opts, resume=True)
    assert rest.drawn == whole.drawn[2:]
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name
    return whole.calls, whole.iters, whole.drawn, weights


def test_training_is_that_of_one_process(opts, tmp_path, caplog):
    """Without a batch in the norms; torchvision's losses are means over images."""
    ranks = run_ranks(train_twice, 2, opts, tmp_path)
    (*_, drawn, weights), (*_, other_drawn, other_weights) = ranks
    for calls, iters, *_ in ranks:
        assert calls == CALLS and iters == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert set(drawn).isdisjoint(other_drawn)
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name

    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert list(saved["model"]) == list(weights)
    whole, _ = losses_of(tmp_path)

    one_folder = tmp_path / "one"
    one, expected = train([*opts, "OUTPUT_DIR", str(one_folder)])
    assert one.drawn == drawn
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close([whole], losses_of(one_folder), rtol=1e-9, atol=1e-12)

    # What two processes left can be continued by one.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with caplog.at_level(logging.WARNING):
        _, continued = train(opts, resume=True)
    assert "random states of 2 processes, and these are 1" in caplog.text
    for name, value in continued.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k} for line in lines]


def read_batches(rank, opts, start):
    cfg = make_cfg(opts)
    loader = build_train_loader(cfg, load_datasets(cfg, "TRAIN"), 5, start)
    batches = [[(r["image_id"], i.sum().item()) for i, _, r in batch] for batch in loader]
    assert len(loader) == len(batches)
    return batches


def test_ranks_share_every_batch(opts):
    whole = read_batches(0, opts, 0)
    first, second = run_ranks(read_batches, 2, opts, 1)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole[1:]
    assert {len(batch) for batch in first + second} == {2}


def evaluate_shares(rank, opts, weights, numbers):
    cfg = make_cfg(opts)
    trainer = Trainer(cfg)
    trainer.model.load_state_dict(torch.load(weights))
    found = []
    for number in numbers:
        datasets = [d._replace(records=d.records[:number]) for d in load_datasets(cfg, "TEST")]
        found.append(repr(evaluate(cfg, trainer.model, datasets)))
        if rank == 0:
            path = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
            found.append(json.loads(path.read_text()))
    return found


def test_evaluation_is_that_of_one_process(opts, tmp_path):
    """To the bit; with an odd number of images, and with fewer than ranks."""
    opts += ["DATASETS.TEST", "('tiny_val',)"]
    torch.save(Trainer(make_cfg(opts)).model.state_dict(), tmp_path / "weights.pth")
    arguments = (opts, tmp_path / "weights.pth", (5, 1))
    first, second = run_ranks(evaluate_shares, 2, *arguments)
    assert first == evaluate_shares(0, *arguments)
    assert len(first[1]) > 100 and second == ["{}", "{}"]


class Poison:
    """A hook that makes the loss of one rank NaN in the last iteration."""

    def before_step(self):
        if self.trainer.rank == 1 and self.trainer.iter == 3:
            self.trainer.model.transform.image_mean = [float("nan")] * 3

    before_train = after_step = after_train = lambda self: None


def train_poisoned(rank, opts):
    trainer = Trainer(make_cfg(opts))
    trainer.register_hooks([Poison()])
    with pytest.raises(FloatingPointError if rank == 1 else RuntimeError) as e:
        trainer.train()
    return str(e.value)


def test_loss_of_one_rank_that_is_not_finite(opts, tmp_path):
    _, message = run_ranks(train_poisoned, 2, opts, stay=False)
    assert message.startswith("loss not finite at iteration 3")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def random_seeds(rank, opts):
    return Trainer(make_cfg(opts)).seed


def test_ranks_agree_on_a_random_seed(opts):
    first, second = run_ranks(random_seeds, 2, [*opts, "SEED", "-1"])
    assert first == second


def population(rank, opts):
    trainer = Trainer(make_cfg(opts))
    trainer.train()
    return {k: b for k, b in trainer.model.named_buffers() if "running" in k}


@pytest.mark.parametrize("averaged", [True, False])
def test_every_rank_has_the_statistics_that_are_saved(averaged, opts, tmp_path):
    opts = [*opts, *norm_opts("BN"), "SOLVER.AVERAGE_BN_STATISTICS", str(averaged)]
    first, second = run_ranks(population, 2, opts)
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    assert all(torch.equal(b, saved[k]) for k, b in first.items())
    assert all(torch.equal(b, saved[k]) for k, b in second.items()) == averaged
