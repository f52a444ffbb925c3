"""The LazyConfig files: as their YAML twins, and run as Detectron2's own tool runs them."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
import json
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType

import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig
from torch import nn

from bn_det.config.load import load_config
from bn_det.config.training import build_hooks, uses_precise_bn
from bn_det.d2 import add_bn_det_config, register_datasets
from bn_det.d2.hooks import HOOKS, build_precise_bn, build_virtual_batch
from bn_det.d2.lazy import StepHooks
from bn_det.d2.train import Trainer
from bn_det.layers.meeting import Calls
from bn_det.training.agc import AdaptiveGradientClipping
from d2_models import make_batch
from lazy_tool import run_as_the_tool_does, shrink

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(p for p in CONFIGS.rglob("*.py") if p.parent.name != "common")
STEMS = [str(p.relative_to(CONFIGS).with_suffix("")) for p in FILES]


def lazy_config(stem):
    return LazyConfig.load(str(CONFIGS / f"{stem}.py"))


def yaml_config(stem, *opts):
    cfg = get_cfg()
    add_bn_det_config(cfg)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.NF.PRETRAINED", "", *opts]
    load_config(cfg, str(CONFIGS / f"{stem}.yaml"), opts, "Detectron2")
    return cfg


SMALL = [
    *("MODEL.WEIGHTS", "", "MODEL.NF.NAME", "test_nfnet", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.RETINANET.NUM_CLASSES", "4"),
    *("MODEL.BN_FCOS.NUM_CLASSES", "4", "MODEL.ROI_HEADS.NUM_CLASSES", "4"),
]
"""KEY VALUE pairs for what lazy_tool.shrink does."""


def plain(value):
    """What can be compared of an attribute: numbers, words, and what is made of them."""
    if isinstance(value, (list, tuple, ListConfig)):
        return [plain(v) for v in value]
    if isinstance(value, (dict, DictConfig)):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (int, float, str, type(None))):
        return value
    name = type(value).__name__.replace("_ShortestEdge", "ResizeShortestEdge")
    if isinstance(value, Calls):  # which have a name once the training begins
        return name
    if isinstance(value, (torch.Tensor, nn.Module, FunctionType, MethodType, partial)):
        return name
    return name, plain(vars(value)) if hasattr(value, "__dict__") else repr(value)


def description(model):
    """The name of each module's class, and its attributes, by its own name."""
    ret = {}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not k.endswith("_hooks")}
        if "loss_weight" in attributes and "box_predictor" in name:
            # 1.0 by default; a config has none
            attributes["loss_weight"] = {**attributes["loss_weight"], "loss_cls": 1.0}
        ret[name] = type(module).__qualname__, plain(attributes)
    return ret


def test_every_coco_config_has_a_twin():
    folders = ("heads", "leakage", "multi_domain", "population", "ways")
    yamls = {f"{f}/{p.stem}" for f in folders for p in (CONFIGS / f).glob("*.yaml")}
    assert set(STEMS) == {stem for stem in yamls if "Base-" not in stem}
    assert len(STEMS) == 45


@pytest.fixture(scope="module", autouse=True)
def tiny_data(tiny_shapes):
    cfg = get_cfg()
    add_bn_det_config(cfg)
    cfg.merge_from_list(tiny_shapes)
    register_datasets(cfg)


@pytest.fixture(scope="module", params=STEMS)
def twins(request, tiny_shapes):
    """A LazyConfig file, its YAML twin, and their detectors in full size, without any numbers."""
    stem = request.param
    lazy, cfg = lazy_config(stem), yaml_config(stem, "MODEL.DEVICE", "meta")
    assert set(lazy) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert ((lazy.dataloader.train.dataset.names,), (lazy.dataloader.test.dataset.names,)) == (
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
    )
    if "pretrained" in lazy.model.backbone.bottom_up:
        assert lazy.model.backbone.bottom_up.pretrained == "timm"
        lazy.model.backbone.bottom_up.pretrained = ""
    with torch.device("meta"):
        models = instantiate(lazy.model), build_model(cfg)
    # The data are not there.
    lazy.dataloader.train.dataset.names, lazy.dataloader.test.dataset.names = NAMES
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((name,) for name in NAMES)
    return lazy, cfg, *models


NAMES = ("tiny_train", "tiny_val")


def test_the_same_detector(twins):
    """Modules, their attributes, keys and shapes of the state dict, and what is trained."""
    _, _, found, expected = twins
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert list(found_state) == list(expected_state)
    assert all(found_state[k].shape == v.shape for k, v in expected_state.items())
    found_modules, expected_modules = description(found), description(expected)
    assert list(found_modules) == list(expected_modules)
    for name, module in expected_modules.items():
        assert found_modules[name] == module, name
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (found, expected)]
    assert trained[0] == trained[1]


def test_the_same_steps(twins):
    """Parameter groups, hooks in their order, clipping and accumulation."""
    lazy, cfg, found, expected = twins
    lazy.optimizer.params.model = found
    optimizers = instantiate(lazy.optimizer), Trainer.build_optimizer(cfg, expected)
    assert isinstance(optimizers[0], type(optimizers[1]))
    assert groups(optimizers[0], found) == groups(optimizers[1], expected)
    precise = build_precise_bn(cfg, expected) if uses_precise_bn(cfg) else None
    virtual = build_virtual_batch(cfg, expected) if cfg.SOLVER.VIRTUAL_IMAGES else None
    (after_step,) = optimizers[0]._optimizer_step_post_hooks.values()
    runner = after_step.__self__
    assert isinstance(runner, StepHooks) and runner.max_iter == lazy.train.max_iter
    times = cfg.SOLVER.ACCUMULATE  # iterations are batches
    hooks = build_hooks(cfg, precise, virtual, HOOKS)
    assert [of_hook(h) for h in runner.hooks] == [of_hook(h, times) for h in hooks]
    assert of_clipping(optimizers[0], found) == of_clipping(optimizers[1], expected)


def groups(optimizer, model):
    """The choices that each parameter is updated with."""
    names = {p: name for name, p in model.named_parameters()}
    keys = ("lr", "weight_decay", "momentum", "nesterov", "dampening")
    return {
        names[p]: {k: group[k] for k in keys}
        for group in optimizer.param_groups
        for p in group["params"]
    }


def of_hook(hook, times=1):
    """A hook's class and choices, its periods taken so many times, and those of its batches."""
    choices = {k: v for k, v in vars(hook).items() if k not in ("trainer", "model", "data_loader")}
    if "periods" in choices:
        choices["periods"] = [p * times for p in choices["periods"]]
    choices = {k: of_hook(v) if k == "precise" and v else plain(v) for k, v in choices.items()}
    loader = getattr(hook, "data_loader", None)
    return type(hook).__name__, choices, loader and of_loader(loader)


def of_loader(loader):
    return loader.batch_size, loader.dataset.num_workers, of_mapper(loader.dataset.dataset.dataset)


def of_mapper(dataset):
    """That of a YAML config also takes images that are long and narrow."""
    return plain(vars(dataset._map_func._obj))


def of_clipping(optimizer, model):
    """The choices of what clips gradients, and the parameters that it clips."""
    names = {p: name for name, p in model.named_parameters()}
    hooks = [
        getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()
    ]
    return [
        (agc.clip_factor, agc.eps, [(names[p], dim) for p, dim in agc.parameters])
        for agc in hooks
        if isinstance(agc, AdaptiveGradientClipping)
    ]


def test_the_same_schedule(twins):
    lazy, cfg, _, expected = twins
    train, times = lazy.train, cfg.SOLVER.ACCUMULATE
    assert lazy.optimizer.accumulate == times
    assert train.max_iter == cfg.SOLVER.MAX_ITER * times
    optimizer = torch.optim.SGD(expected.parameters(), lr=1.0)
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier
    found = instantiate(lazy.lr_multiplier)
    last = cfg.SOLVER.MAX_ITER
    steps = {
        *range(1200),
        *range(0, last, 997),
        *(m + k for m in cfg.SOLVER.STEPS for k in (-1, 0, 1)),
    }
    for step in sorted(steps):
        # the batch with which the optimizer steps
        where = (step * times + times - 1) / train.max_iter
        assert found(where) == pytest.approx(multiplier(step / last), rel=1e-9)


def test_the_same_data_and_the_rest(twins):
    lazy, cfg, _, _ = twins
    train = lazy.train
    loaders = instantiate(lazy.dataloader.train), Trainer.build_train_loader(cfg)
    assert of_loader(loaders[0]) == of_loader(loaders[1])
    loaders = instantiate(lazy.dataloader.test), Trainer.build_test_loader(cfg, "tiny_val")
    assert [loader.batch_size for loader in loaders] == [1, 1]
    assert loaders[0].num_workers == loaders[1].num_workers
    mappers = [of_mapper(loader.dataset) for loader in loaders]
    for mapper in mappers:
        mapper.pop("use_instance_mask")  # annotations are not read
    assert mappers[0] == mappers[1]
    evaluators = instantiate(lazy.dataloader.evaluator), Trainer.build_evaluator(cfg, "tiny_val")
    assert evaluators[0]._output_dir == evaluators[1]._output_dir
    times = cfg.SOLVER.ACCUMULATE
    assert train.output_dir == cfg.OUTPUT_DIR
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert train.eval_period == cfg.TEST.EVAL_PERIOD * times
    assert train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD * times
    assert train.amp.enabled == cfg.SOLVER.AMP.ENABLED and train.seed == cfg.SEED


@pytest.mark.parametrize("stem", STEMS)
def test_the_same_losses(stem):
    """With the same weights, small."""
    lazy, cfg = shrink(lazy_config(stem)), yaml_config(stem, *SMALL)
    models = instantiate(lazy.model), build_model(cfg)
    models[0].load_state_dict(models[1].state_dict())
    inputs = make_batch([2, 3], size=160 if stem == "ways/GhostBN" else 96)  # 2 x 2 at p7, or 1
    losses = []
    for model in models:
        torch.manual_seed(1)  # samples of RoIs, and ghosts
        with torch.no_grad(), EventStorage():
            losses.append(model(copy.deepcopy(inputs)))
    assert len(losses[0]) >= 2 and losses[0] == losses[1]


class Batches:
    """Always the same ones."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(copy.deepcopy(self.batches))


YAML_TRAINING = [
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(2,)"),
    *("SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.PRECISE_BN.NUM_ITER", "2"),
    *("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "()"),
]
OWN = {
    "ways/BRN": (
        [
            *("SOLVER.BRN.WARMUP_ITERS", "1", "SOLVER.BRN.R_MAX_ITER", "3"),
            "SOLVER.BRN.D_MAX_ITER",
            "4",
        ],
        {"renorm": {"warmup_iters": 1, "r_max_iter": 3, "d_max_iter": 4}},
    ),
    "ways/VirtualBN": (["SOLVER.VIRTUAL_IMAGES", "2"], {}),
    "population/retinanet_frozen": (
        ["SOLVER.FREEZE_BN_ITER", "2"],
        {"freeze_bn": {"iteration": 2}},
    ),
}


@pytest.mark.parametrize(
    "stem",
    ["ways/AGC", "ways/PreciseBN", "ways/no_update", "ways/accumulate", *OWN],
)
def test_the_same_training(stem, tmp_path):
    """That of our trainer of YAML files from the same weights and images, up to rounding."""
    opts, choices = OWN.get(stem, ([], {}))
    out = tmp_path / "yaml"
    cfg = yaml_config(stem, *SMALL, *YAML_TRAINING, *opts, "OUTPUT_DIR", str(out))
    trainer = Trainer(cfg)
    start = tmp_path / "start.pth"
    torch.save({"model": trainer.model.state_dict()}, start)
    times = cfg.SOLVER.ACCUMULATE
    batches = [make_batch([2, 3]) for _ in range(4 * times)]
    extra = Batches([make_batch([2, 2]) for _ in range(4)])
    trainer._trainer._data_loader_iter_obj = iter(copy.deepcopy(batches))
    for hook in trainer._hooks:
        for with_data in (hook, getattr(hook, "precise", None)):
            if hasattr(with_data, "data_loader"):
                with_data.data_loader = extra
    trainer.train()

    lazy = shrink(lazy_config(stem))
    for name, of_hook in choices.items():
        lazy.optimizer.hook_nodes[name].update(of_hook)
    for name in ("precise_bn", "virtual_batch"):
        lazy.optimizer.hook_nodes[name].data_loader = extra
    schedule = lazy.lr_multiplier.scheduler if times > 1 else lazy.lr_multiplier
    schedule.scheduler.update(values=[1.0, 0.1], milestones=[2, 4])
    schedule.warmup_length = 1 / 4
    lazy.train.update(
        max_iter=4 * times,
        eval_period=2 * times,
        output_dir=str(tmp_path / "lazy"),
        init_checkpoint=str(start),
    )
    lazy.train.checkpointer.period = 2 * times
    run_as_the_tool_does(lazy, batches=copy.deepcopy(batches), evaluate=False)
    for yaml_name, name in (("model_0000001", f"model_{2 * times - 1:07}"), ("model_final",) * 2):
        expected = torch.load(out / f"{yaml_name}.pth", weights_only=False)["model"]
        found = torch.load(tmp_path / "lazy" / f"{name}.pth", weights_only=False)["model"]
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
            )
    before = torch.load(start, weights_only=False)["model"]
    assert any(not torch.equal(value, before[key]) for key, value in expected.items())


def small_run(stem, folder, **train):
    lazy = shrink(lazy_config(stem))
    lazy.train.update(output_dir=str(folder), **train)
    return lazy


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize(
    "stem",
    [
        *("heads/cascade_per_level", "heads/fcos_per_level", "heads/rpn_per_level"),
        *("leakage/head_BN_shuffle", "multi_domain/shared-per_domain-shared"),
    ],
)
def test_under_the_tool(stem, tmp_path):
    """Two iterations and an evaluation on images, with nothing but what a user can override."""
    lazy = small_run(stem, tmp_path, max_iter=2)
    _, evaluated = run_as_the_tool_does(lazy)
    keys = {key for line in metrics(tmp_path) for key in line}
    assert {"bbox/AP", "total_loss"} <= keys
    assert ("precise_bn/error" in keys) == ("precise_bn" in lazy.optimizer.hooks)
    assert ("segm/AP" in keys) == ("mask_head" in lazy.model.get("roi_heads", {}))
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(saved[key], value) for key, value in evaluated[-1].items())


def test_every_config_can_be_saved(tmp_path):
    """As the tool does first: to YAML, and not only to a pickle."""
    for k, stem in enumerate(STEMS):
        LazyConfig.save(lazy_config(stem), str(tmp_path / f"{k}.yaml"))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".yaml"] * len(STEMS)
