"""What LazyConfig files are made of: norms, and an optimizer with hooks around its steps."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, RoILevelBatchNorm2d
from bn_det.d2.lazy import EachStep, build_optimizer, make_norm
from bn_det.errors import InputError
from bn_det.training.agc import AdaptiveGradientClipping
from built import CONFIGS

RENORM = {"name": "BRN", "renorm": [2.0, 1.0]}


@pytest.mark.parametrize(
    "choices, kind, attributes",
    [
        ({}, BatchNorm2d, {"group": None, "ghost_size": None, "eval_statistics": "population"}),
        ({"eval_statistics": "batch"}, BatchNorm2d, {"eval_statistics": "batch"}),
        ({"name": "SyncBN"}, BatchNorm2d, {"group": "world"}),
        (
            {"name": "GhostBN", "ghost_size": 4, "ghost_order": "random"},
            BatchNorm2d,
            {"ghost_size": 4, "ghost_order": "random"},
        ),
        (RENORM, BatchNorm2d, {"renorm": (2.0, 1.0)}),
        (
            {"num_levels": 3, "statistics": "shared"},
            DomainBatchNorm2d,
            {"num_domains": 3, "statistics": "shared", "population": "per_domain"},
        ),
        (
            {"num_roi_levels": 4, "population": "shared", "update_population": False},
            RoILevelBatchNorm2d,
            {"num_domains": 4, "population": "shared", "update_population": False},
        ),
        ({"name": "GN", "num_levels": 3}, nn.GroupNorm, {"num_groups": 32}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else None,
)
def test_norms(choices, kind, attributes):
    layer = make_norm(**choices)(64)
    assert type(layer) is kind
    assert {name: getattr(layer, name) for name in attributes} == attributes


def test_l1bn_of_levels():
    layer = make_norm("L1BN", num_levels=3)(4)
    ys = layer([torch.randn(2, 4, 3, 3) for _ in range(3)])
    assert len(ys) == 3


def test_no_norm_and_no_such_norm():
    assert make_norm("") == ""
    with pytest.raises(InputError, match="norm.name: 'bn' is not accepted"):
        make_norm("bn")
    with pytest.raises(InputError, match=r"norm.ghost_size: 0 .* 'GhostBN' takes 1 sample or more"):
        make_norm("GhostBN")
    with pytest.raises(InputError, match="norm.population: 'shared' is not .* norm.num_levels"):
        make_norm("SyncBN", population="shared")


def test_a_number_of_levels_that_is_zero_is_no_missing_one():
    for roi_levels in ({}, {"num_roi_levels": 3}):
        with pytest.raises(InputError, match="num_domains: 0 is not accepted"):
            make_norm(num_levels=0, **roi_levels)(4)


class Notes(HookBase):
    """What is called, and in which iteration."""

    def __init__(self):
        self.notes = []

    def note(self, name):
        self.notes.append((name, self.trainer.iter))

    def before_train(self):
        self.note("before_train")

    def before_step(self):
        self.note("before_step")

    def after_step(self):
        self.note("after_step")


def make(model=None, notes=None, **kwargs):
    """A model, its optimizer, and a hook."""
    model, notes = model or nn.Linear(2, 1, bias=False), notes or Notes()
    kwargs = {
        "lr": 0.1,
        "max_iter": 4,
        "hooks": ["notes"],
        "hook_nodes": {"notes": notes},
        **kwargs,
    }
    return model, build_optimizer(model.parameters(), model=model, **kwargs), notes


def step(model, optimizer, x, scaler=None):
    loss = model(torch.as_tensor(x)).sum()
    optimizer.zero_grad()
    (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def test_hooks_run_around_each_step():
    model, optimizer, notes = make()
    x = torch.ones(1, 2)
    model(x)  # no training
    with EventStorage(7) as storage:  # as in a resumed one
        for iteration in (7, 8):
            storage.iter = iteration
            step(model, optimizer, x)
            # passes that are no step: evaluation, and PreciseBN after the step
            model.eval()(x)
            model.train()(x)
        storage.iter = 9
        model.eval()(x)
        copy.deepcopy(model).train()(x)
    assert notes.notes == [
        *(("before_train", 7), ("before_step", 7), ("after_step", 7)),
        *(("before_step", 8), ("after_step", 8)),
    ]


def test_a_step_whose_gradient_overflows():
    """torch's GradScaler leaves the step out: the weights stay, but hooks are run."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, notes = make()
    with EventStorage() as storage:
        for x, moved in (([[1.0, 2.0]], [0.1, 0.2]), ([[float("inf"), 0.0]], [0.0, 0.0])):
            before = model.weight.detach().clone()
            step(model, optimizer, x, scaler)
            assert torch.allclose(before - model.weight, torch.tensor([moved]))
            storage.iter += 1
    assert notes.notes[-1] == ("after_step", 1)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("amp", [False, True])
def test_accumulation_clips_the_mean_gradient(amp):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if amp else None
    model = nn.Linear(2, 1, bias=False)
    expected = copy.deepcopy(model)
    _, optimizer, _ = make(
        model, accumulate=2, momentum=0.9, weight_decay=0.1, agc={"clip_factor": 0.5}
    )
    xs = [[[1.0, 2.0]], [[3.0, 0.0]], [[0.0, 0.1]], [[0.1, 0.0]]]
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    AdaptiveGradientClipping(expected, 0.5).attach(reference)
    for k in (0, 2):
        before = model.weight.detach().clone()
        step(model, optimizer, xs[k], scaler)
        assert torch.equal(model.weight, before)
        step(model, optimizer, xs[k + 1], scaler)
        reference.zero_grad()
        (sum(expected(torch.tensor(x)).sum() for x in xs[k : k + 2]) / 2).backward()
        reference.step()
        torch.testing.assert_close(model.weight, expected.weight)


def test_the_kind_and_the_random_numbers():
    """A hook may draw some as it is made; one that does not run is not made."""

    class Draws(Notes):
        def __init__(self):
            super().__init__()
            torch.rand(3)

    model = nn.Linear(2, 1)
    state = torch.get_rng_state()
    nodes = {"draws": L(Draws)(), "other": L(int)(no="argument of int")}
    choices = {"hooks": ["draws"], "hook_nodes": nodes, "betas": (0.8, 0.9)}
    _, optimizer, _ = make(model, kind="torch.optim.AdamW", **choices)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.8, 0.9)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_kind_of_optimizer_in_a_file():
    """What it does not take is set to None."""
    cfg = LazyConfig.load(str(CONFIGS / "ways" / "GN.py"))
    cfg = LazyConfig.apply_overrides(
        cfg, ["optimizer.kind=torch.optim.AdamW", "optimizer.momentum=null", "optimizer.lr=0.001"]
    )
    model = nn.Sequential(nn.Linear(2, 1))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 0.001


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"hooks": ["note"]}, "optimizer.hooks: 'note' has no node; nearest names: ..notes"),
        ({"accumulate": 3}, "train.max_iter: 4 is not accepted .* a multiple of 3"),
        ({"accumulate": 0}, "num_batches: 0 is not accepted"),
        ({"agc": {"clip_factor": 0.0}}, "clip_factor: 0.0 is not accepted"),
    ],
)
def test_what_is_refused(choices, words):
    with pytest.raises(InputError, match=words):
        make(**choices)


def test_all_batches_of_a_step_have_its_learning_rate():
    schedule = LinearParamScheduler(1.0, 0.0)
    found = [EachStep(schedule, 3, 30)(k / 30) for k in range(30)]
    assert found == [schedule(step / 10) for step in range(10) for _ in range(3)]
