"""The monitor in Detectron2's trainings: our trainer, a stock DefaultTrainer, LazyConfig files."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import json

import torch
from detectron2.config import LazyConfig
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import d2_models
from bn_det.d2 import BNHooks, Monitor, register_datasets
from bn_det.d2.train import Trainer
from bn_det.errors import InputError
from here import ROOT
from lazy_tool import run_as_the_tool_does, shrink
from reference import BASE

pytestmark = pytest.mark.usefixtures("one_thread")


class Stock(DefaultTrainer):
    """As in a project that uses nothing of ours but the hook."""

    def build_hooks(self):
        ret = super().build_hooks()
        ret.insert(0, Monitor(2))  # as docs/monitor.md has it
        return ret


class Mixed(BNHooks, DefaultTrainer):
    pass


def build(tiny_shapes, folder, trainer_class, *opts):
    cfg = d2_models.make_cfg(
        *(BASE, *tiny_shapes, "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()", *opts),
    )
    register_datasets(cfg)
    folder.mkdir()
    seed_all_rng(3)
    return trainer_class(cfg)


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    found = {}
    for line in lines:
        of_monitor = {k: v for k, v in line.items() if "bn_monitor" in k}
        if of_monitor:
            found[line["iteration"]] = of_monitor
    return found


TRAINERS = {
    "ours": (Trainer, ["TEST.BN_MONITOR", "2"]),
    "with BNHooks": (Mixed, ["TEST.BN_MONITOR", "2"]),
    "stock": (Stock, []),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_metrics_of_a_training_that_is_the_same(kind, tiny_shapes, tmp_path):
    trainer_class, opts = TRAINERS[kind]
    without = DefaultTrainer if kind == "stock" else trainer_class
    off = [] if kind == "stock" else ["TEST.BN_MONITOR", "0"]
    levels = ["MODEL.RETINANET.BN.POPULATION", "shared"]
    states = []
    # torch 2.15 rounds otherwise in the first training of a process
    for name, of, more in (
        ("first", without, off),
        ("off", without, off),
        ("on", trainer_class, opts),
    ):
        trainer = build(tiny_shapes, tmp_path / name, of, *levels, *more)
        trainer.train()
        saved = torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"]
        states.append({**saved, "random": torch.get_rng_state()})
    _, expected, state = states
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert metrics(tmp_path / "off") == {}
    # Detectron2 writes what is latest, every 20 iterations and at the end.
    names = "staleness", "noise", "between_share", "non_finite"
    found = metrics(tmp_path / "on")
    assert found.keys() == {3} and found[3].keys() == {f"bn_monitor/{name}" for name in names}
    assert found[3]["bn_monitor/noise"] > 0
    events = EventAccumulator(str(tmp_path / "on")).Reload()
    assert [event.step for event in events.Scalars("bn_monitor/noise")] == [3]


def test_a_key_that_a_trainer_does_not_read(tiny_shapes, tmp_path):
    with pytest.raises(InputError, match="TEST.BN_MONITOR: 2 does nothing in DefaultTrainer"):
        build(tiny_shapes, tmp_path / "out", DefaultTrainer, "TEST.BN_MONITOR", "2")


def test_lazy_config(tiny_shapes, tmp_path):
    """In the optimizer, as the tool takes no hooks."""
    register_datasets(d2_models.make_cfg(BASE, *tiny_shapes))
    lazy = shrink(LazyConfig.load(str(ROOT / "configs" / "ways" / "PreciseBN.py")))
    lazy.train.update(max_iter=4, output_dir=str(tmp_path))
    lazy.optimizer.hook_nodes.monitor.period = 2
    assert list(lazy.optimizer.hooks) == ["loss_spikes", "monitor", "precise_bn", "average"]
    run_as_the_tool_does(lazy, evaluate=False)
    found = metrics(tmp_path)
    assert found.keys() == {1, 3} and found[3]["bn_monitor/noise"] > 0


def test_beside_detectron2s_precise_bn(tiny_shapes, tmp_path, caplog):
    """Which runs the model in training mode between steps, and is meant to."""
    opts = (
        "TEST.PRECISE_BN.ENABLED",
        "True",
        "TEST.PRECISE_BN.NUM_ITER",
        "2",
        "TEST.EVAL_PERIOD",
        "2",
    )
    trainer = build(tiny_shapes, tmp_path / "run", Stock, *opts, "MODEL.RETINANET.NORM", "")
    trainer.train()
    layer = trainer.model.backbone.bottom_up.stem.conv1.norm
    assert int(layer.num_batches_tracked) > 4
    assert not [m for r in caplog.records if (m := r.getMessage()).startswith("BN503")]
