"""Mixed precision on both hosts: SOLVER.AMP."""

import argparse
import copy
import itertools
import json
import logging

import pytest
import torch
from torch import nn

import bn_det
from bn_det import BatchNorm2d, DomainBatchNorm2d
from bn_det.config.training import mixed_precision_of
from bn_det.errors import InputError
from bn_det.training.mixed_precision import autocast
from hosts import INSTALLED, every_host, make_cfg
from ranks import run_ranks
from reference import BASE, RCNN, norm_opts

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64", "DATASETS.TEST", "()"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *("SOLVER.WARMUP_ITERS", "0", "DATALOADER.NUM_WORKERS", "0", "TEST.BN_MONITOR", "0"),
    *("MODEL.DEVICE", "cpu"),
]
FLOAT16 = ["SOLVER.AMP.ENABLED", "True"]
BFLOAT16 = [*FLOAT16, "SOLVER.AMP.DTYPE", "bfloat16"]

NORMS = {
    "RetinaNet": ["RESNETS.NORM", "BN", "FPN.NORM", "BRN", "RETINANET.NORM", "GhostBN"],
    "RetinaNet, others": ["RESNETS.NORM", "L1BN", "FPN.NORM", "SyncBN", "RETINANET.NORM", "LRN"],
    "Mask R-CNN": [
        *("RESNETS.NORM", "GhostBN", "FPN.NORM", "L1BN", "RPN.NORM", "BN"),
        *("ROI_BOX_HEAD.NORM", "BRN", "ROI_MASK_HEAD.NORM", "SyncBN"),
    ],
}
"""Every norm of ours, in one part or another."""


def opts_of(kind):
    """KEY VALUE pairs of a small detector."""
    norms = [f"MODEL.{o}" if "NORM" in o else o for o in NORMS[kind]]
    of_kind = RCNN if kind == "Mask R-CNN" else []
    heads = ["MODEL.RPN.HEAD_NAME", "BNRPNHead", "MODEL.RETINANET.GHOST_SIZE", "2"]
    return [*SMALL, *of_kind, *heads, "MODEL.RESNETS.GHOST_SIZE", "2", *norms]


def losses_of(host, model, batch):
    torch.manual_seed(6)  # the sampling of RoIs
    if host == "torchvision":
        from bn_det.tv.trainer import losses_of

        return losses_of(model, batch)
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return model(copy.deepcopy(batch))


def first_batch(host, trainer):
    if host == "torchvision":
        return next(trainer._batches(0))
    return next(trainer._trainer._data_loader_iter)


@every_host
@pytest.mark.parametrize(
    "kind, opts",
    [("RetinaNet", FLOAT16), ("RetinaNet, others", BFLOAT16), ("Mask R-CNN", BFLOAT16)],
)
@torch.no_grad()
def test_losses_and_statistics(host, kind, opts, tiny_shapes, tmp_path):
    """Near those of float32: a forward pass rounds some twenty times, at random."""
    opts = [*tiny_shapes, *opts_of(kind), *opts, "OUTPUT_DIR", str(tmp_path), "SEED", "3"]
    cfg = make_cfg(host, BASE, *opts)
    dtype = mixed_precision_of(cfg)
    tolerance = 20 * torch.finfo(dtype).eps
    trainer = make_trainer(host, cfg)
    model, batch = trainer.model, first_batch(host, trainer)
    exact = copy.deepcopy(model)
    expected = losses_of(host, exact, batch)
    seen = []
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    with autocast("cpu", dtype):
        losses = losses_of(host, model, batch)
    assert set(seen) == {dtype} and len(seen) >= len(convs)
    total = sum(losses.values())
    assert total.dtype == torch.float32
    assert total == pytest.approx(sum(expected.values()).item(), rel=tolerance)
    statistics = dict(exact.named_buffers())
    for name, found in model.named_buffers():
        if "running_" in name:
            assert found.dtype == torch.float32, name
            of_layer = name.rpartition(".")[0]
            # A mean is off by so much of a standard deviation.
            var = statistics.get(f"{of_layer}.running_var", statistics[name])
            scale = var.abs().mean().sqrt() if "mean" in name else var.mean()
            assert (found - statistics[name]).abs().mean() <= tolerance * scale, name


class Recorder:
    """A hook that keeps what the optimizer and the layers have after each step."""

    def __init__(self, optimizer):
        self.optimizer, self.states, self.lrs, self.moments = optimizer, [], [], []

    def before_train(self):
        self._keep()

    def after_step(self):
        self._keep()

    def _keep(self):
        self.states.append({k: v.clone() for k, v in self.trainer.model.state_dict().items()})
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.moments.append(len(self.optimizer.state))

    before_step = after_train = lambda self: None


def make_trainer(host, cfg):
    torch.manual_seed(3)
    if host == "torchvision":
        from bn_det.tv.trainer import Trainer

        return Trainer(cfg)
    from detectron2.utils.env import seed_all_rng

    from bn_det.d2 import register_datasets
    from bn_det.d2.train import Trainer

    register_datasets(cfg)
    seed_all_rng(3)
    return Trainer(cfg)


def scaler_of(trainer):
    return getattr(trainer, "_trainer", trainer).grad_scaler


def train(host, cfg, scale):
    """From a scale that overflows, and comes down to one that does not after a step."""
    trainer = make_trainer(host, cfg)
    trainer.resume_or_load(False)
    if scale:
        state = {**scaler_of(trainer).state_dict(), "scale": 2.0**100}
        scaler_of(trainer).load_state_dict({**state, "backoff_factor": scale / 2.0**100})
    recorder = Recorder(trainer.optimizer)
    if host == "detectron2":
        from detectron2.engine import HookBase

        hook = HookBase()
        for name in ("before_train", "after_step"):
            setattr(hook, name, getattr(recorder, name))
        recorder.trainer = trainer
        # Before the schedule moves.
        trainer._hooks.insert(0, hook)
    else:
        trainer.register_hooks([recorder])
    trainer.train()
    return trainer, recorder


STEPS = [
    *(*norm_opts("BN"), "SOLVER.MAX_ITER", "2", "SOLVER.ACCUMULATE", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.0"),
    *("SOLVER.STEPS", "(1,)", "SOLVER.BASE_LR", "1.0", "SOLVER.AGC.ENABLED", "True"),
    *("SOLVER.AGC.CLIP_FACTOR", "1e-4", "SOLVER.AGC.EXCLUDE", "[]"),
]


@every_host
def test_a_step_that_overflows_is_left_out(host, tiny_shapes, tmp_path):
    """And nothing else: statistics and schedule go on. The next one is clipped as in float32."""
    opts = [*tiny_shapes, *SMALL, *STEPS, "SEED", "3"]
    cfg = make_cfg(host, BASE, *opts, *FLOAT16, "OUTPUT_DIR", str(tmp_path / "float16"))
    trainer, recorder = train(host, cfg, scale=2.0**10)
    before, skipped, after = recorder.states
    assert scaler_of(trainer).get_scale() == 2.0**10
    learned = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[k], skipped[k]) for k in learned)
    assert recorder.moments[1] == 0 and recorder.moments[2] == len(learned)
    counts = [k for k in before if k.endswith("num_batches_tracked")]
    for state, number in ((before, 0), (skipped, 2), (after, 4)):
        assert {state[k].item() for k in counts} == {number}
    for name in (k for k in before if "running_" in k):
        assert skipped[name].dtype == torch.float32 and skipped[name].isfinite().all(), name
        assert not torch.equal(skipped[name], before[name]), name

    cfg = make_cfg(host, BASE, *opts, "OUTPUT_DIR", str(tmp_path / "float32"))
    _, other = train(host, cfg, scale=None)
    assert recorder.lrs == other.lrs and len(set(other.lrs)) == 2
    # The first step of theirs is at ten times the rate, and from other images; all is clipped.
    norms = [
        torch.cat([(b[k] - a[k]).flatten() for k in learned]).norm().item() / lr
        for a, b, lr in ((skipped, after, 0.1), (other.states[0], other.states[1], 1.0))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@every_host
def test_resuming(host, tiny_shapes, tmp_path):
    """The scale goes on; after a run without one there is a new one."""
    opts = [*tiny_shapes, *SMALL, *norm_opts("BN"), "SOLVER.MAX_ITER", "1", "SEED", "3"]
    opts += ["OUTPUT_DIR", str(tmp_path)]
    cfgs = [make_cfg(host, BASE, *opts, *of_run) for of_run in (FLOAT16, BFLOAT16)]
    new = torch.amp.GradScaler("cpu").state_dict()
    state = {**new, "scale": 2.0**7, "_growth_tracker": 5}
    for k, cfg in enumerate(cfgs):
        trainer = make_trainer(host, cfg)
        scaler_of(trainer).load_state_dict(state)  # which that of bfloat16 does not
        trainer.iter = 0
        trainer.checkpointer.save("model_0000000", iteration=0)
        resumed = make_trainer(host, cfgs[0])
        resumed.resume_or_load(True)
        assert scaler_of(resumed).state_dict() == (new if k else state)


@every_host
def test_other_passes_of_a_training(host, tiny_shapes, tmp_path):
    """PreciseBN and extra images are run as the steps are; evaluation in float32."""
    passes = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "1"]
    passes += ["SOLVER.VIRTUAL_IMAGES", "2", "SOLVER.MAX_ITER", "1", *norm_opts("BN")]
    opts = [*tiny_shapes, *SMALL, *passes, *BFLOAT16, "DATASETS.TEST", "('tiny_val',)"]
    cfg = make_cfg(host, BASE, *opts, "OUTPUT_DIR", str(tmp_path), "SEED", "3")
    trainer = make_trainer(host, cfg)
    trainer.resume_or_load(False)
    seen = []
    conv = next(m for m in trainer.model.modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda m, args, y: seen.append((m.training, y.dtype)))
    trainer.train()
    # Extra images, the step, PreciseBN; then six images by themselves.
    assert seen == [(True, torch.bfloat16)] * 3 + [(False, torch.float32)] * 6
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert any("precise_bn/num_batches" in json.loads(line) for line in lines)


def overflow_on_one(rank, opts):
    """Two steps; in the first one a gradient of rank 1 is infinite."""
    from bn_det.tv.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(make_cfg("torchvision", BASE, *opts))
    weight = next(trainer.model.head.parameters())
    start = weight.detach().clone()
    handle = weight.register_hook(lambda g: g * float("inf")) if rank else None
    batches = trainer._batches(0)
    found = []
    for _ in range(2):
        trainer.run_step(list(itertools.islice(batches, 1)))
        found.append((scaler_of(trainer).get_scale(), torch.equal(weight, start)))
        if handle:
            handle.remove()
    return found, [p.detach() for p in trainer.model.parameters()]


def test_processes_leave_out_the_same_steps(tiny_shapes, tmp_path):
    norms = [*norm_opts("SyncBN"), "MODEL.BACKBONE.FREEZE_AT", "3"]
    opts = [*tiny_shapes, *SMALL, *norms, *FLOAT16, "OUTPUT_DIR", str(tmp_path)]
    (found, weights), (other, other_weights) = run_ranks(overflow_on_one, 2, opts, timeout=200)
    assert found == other
    assert found[0] == (2.0**15, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


class Levels(nn.Module):
    """Convolutions with BatchNorm of torch's and of ours, on two levels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.ours = nn.Sequential(nn.Conv2d(8, 8, 3), BatchNorm2d(8, ghost_size=4), nn.ReLU())
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3), DomainBatchNorm2d(8, 2, statistics="shared"), nn.ReLU()
        )

    def forward(self, x):
        x = self.ours(self.stem(x))
        return bn_det.forward_levels(self.head, [x, x[:, :, ::2, ::2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_passes_under_autocast(dtype):
    """Recomputed statistics, and what the doctor sees, are those of float32 to a few roundings."""
    batches = [torch.randn(8, 3, 16, 16) * (k + 1) + k for k in range(4)]
    model = Levels()
    exact = copy.deepcopy(model)
    bn_det.update_bn_stats(exact, batches, 4)
    with autocast("cpu", dtype):
        bn_det.update_bn_stats(model, batches, 4)
        report = bn_det.examine(model, batches)
    expected = dict(exact.named_buffers())
    for name, found in model.named_buffers():
        if "running_" in name:
            assert found.dtype == torch.float32
            scale = expected[name].abs().max()
            error = (found - expected[name]).abs().max() / scale
            assert 0 < error <= 4 * torch.finfo(dtype).eps, name
    wanted = bn_det.examine(exact, batches)
    assert [of.rule for of in report.findings] == [of.rule for of in wanted.findings]
    for a, b in zip(report.layers, wanted.layers, strict=True):
        assert a.name == b.name and a.noise == pytest.approx(b.noise, rel=0.05)


@every_host
def test_values(host, caplog):
    with pytest.raises(InputError, match=r"SOLVER.AMP.DTYPE: 'half' .*\['float16', 'bfloat16'\]"):
        make_cfg(host, BASE, "SOLVER.AMP.DTYPE", "half")
    with caplog.at_level(logging.WARNING):
        make_cfg(host, BASE, "SOLVER.AMP.DTYPE", "bfloat16")
    assert "SOLVER.AMP.DTYPE: 'bfloat16' does nothing with SOLVER.AMP.ENABLED False" in caplog.text


@pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed")
def test_a_value_in_a_lazyconfig_file():
    from bn_det.d2.lazy_train import setup
    from here import ROOT

    file = str(ROOT / "configs" / "ways" / "GN.py")
    args = argparse.Namespace(config_file=file, opts=["train.amp.dtype=half"])
    args.resume, args.eval_only = False, True
    with pytest.raises(InputError, match=r"train.amp.dtype: 'half' .*\['float16', 'bfloat16'\]"):
        setup(args)
