"""DefaultTrainer as it is with TEST.PRECISE_BN.ENABLED, and with our hooks."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import fvcore.nn
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.env import seed_all_rng
from torch import nn

import d2_models
from bn_det import BatchNorm2d, update_bn_stats
from bn_det.d2 import BNHooks, register_datasets
from bn_det.d2.default_trainer import suits_fvcore
from bn_det.d2.train import Trainer, check_data
from bn_det.errors import InputError
from bn_det.training.hooks import Hook, PreciseBN
from kinds import KINDS, SOURCES, call, inputs_of
from reference import BASE, RCNN

pytestmark = pytest.mark.usefixtures("one_thread")


class Stock(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


class Mixed(BNHooks, Stock):
    """A project's, with loaders of its own."""

    @classmethod
    def build_train_loader(cls, cfg):
        LOADED.append(cfg.SOLVER.IMS_PER_BATCH)
        return super().build_train_loader(cfg)


LOADED = []
"""The images of a batch of each loader that it has built."""


@pytest.fixture
def make_cfg(tiny_shapes, tmp_path):
    def make(*opts):
        cfg = d2_models.make_cfg(
            *(BASE, *tiny_shapes, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"),
            *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
            *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "3", *opts),
        )
        register_datasets(cfg)
        return cfg

    return make


PLAIN = [
    *(*RCNN, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "SyncBN"),
    *("MODEL.RPN.HEAD_NAME", "BNRPNHead", "MODEL.RPN.NORM", "GN"),
]
"""A detector of whose layers none is of several levels."""

WRONG = {
    "RETINANET.NORM 'BN' (DomainBatchNorm2d)": [],
    "BN_FCOS.NORM 'SyncBN' (DomainBatchNorm2d": [
        *("MODEL.META_ARCHITECTURE", "BNFCOS", "MODEL.BN_FCOS.NORM", "SyncBN"),
        *("MODEL.BN_FCOS.NUM_CLASSES", "4"),
        *("MODEL.BACKBONE.NAME", "build_bn_fcos_resnet_fpn_backbone"),
    ],
    "RPN.NORM 'BN' (DomainBatchNorm2d)": [*PLAIN, "MODEL.RPN.NORM", "BN"],
    "ROI_BOX_HEAD.NORM 'BN' (RoILevelBatchNorm2d)": [
        *(*PLAIN, "MODEL.ROI_HEADS.NAME", "BNCascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.BN.STATISTICS", "per_domain"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    ],
    "FPN.NORM 'SyncBN' (SourceBatchNorm2d": [
        *(*PLAIN, "MODEL.META_ARCHITECTURE", "BNGeneralizedRCNN"),
        *("MODEL.BN_SOURCES.PARTS", "['FPN']"),
        *("DATASETS.SOURCES", "[['a', 'tiny_train'], ['b', 'tiny_val']]"),
    ],
    "ROI_MASK_HEAD.NORM 'GhostBN' (BatchNorm2d, normalization_batch=2 contiguous samples)": [
        *(*PLAIN, "MODEL.ROI_MASK_HEAD.NORM", "GhostBN", "MODEL.ROI_MASK_HEAD.GHOST_SIZE", "2"),
    ],
    "RESNETS.NORM 'BRN' (BatchNorm2d, renorm=(3.0, 5.0))": [*PLAIN, "MODEL.RESNETS.NORM", "BRN"],
    "ROI_BOX_HEAD.NORM 'BN' (BatchNorm2d, train_statistics=population)": [
        *(*PLAIN, "SOLVER.BN_STATISTICS", "population"),
        *("SOLVER.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD']"),
    ],
    "RESNETS.NORM 'BN' (BatchNorm2d, update_population=False)": [
        *(*PLAIN, "SOLVER.UPDATE_POPULATION", "False"),
    ],
}


@pytest.mark.parametrize("where", WRONG)
def test_what_fvcore_gets_wrong_is_refused(where, make_cfg, tmp_path):
    """As the trainer is made."""
    with pytest.raises(InputError) as e:
        Stock(make_cfg(*WRONG[where]))
    message = str(e.value)
    begin = "TEST.PRECISE_BN.ENABLED: True is not accepted in Stock, a DefaultTrainer, with MODEL."
    assert message.startswith(begin + where) and "\n" not in message
    assert "put bn_det.d2.BNHooks before DefaultTrainer in the bases of Stock" in message
    assert not list(tmp_path.iterdir())


OURS = ["LossSpikes", "Monitor", "PreciseBN", "AverageStatistics"]
OURS_OR_SAVES = (Hook, PeriodicCheckpointer)


def test_other_uses_of_the_config(make_cfg):
    cfg = make_cfg()
    Stock.build_model(cfg)
    DefaultPredictor(cfg)
    for trainer in (Mixed(cfg), Trainer(cfg)):
        kinds = [type(hook).__name__ for hook in trainer._hooks if isinstance(hook, OURS_OR_SAVES)]
        assert kinds == [*OURS, "PeriodicCheckpointer"]
        assert trainer.cfg.TEST.PRECISE_BN.ENABLED
    cfg.TEST.PRECISE_BN.ENABLED = False
    Stock(cfg)


def test_a_project_without_evaluation(make_cfg):
    """Our hooks are then the last ones."""

    class Short(Stock):
        def build_hooks(self):
            return super().build_hooks()[:2]

    class MixedShort(BNHooks, Short):
        pass

    kinds = [type(hook).__name__ for hook in MixedShort(make_cfg())._hooks]
    assert kinds == ["IterationTimer", "LRScheduler", *OURS]


def test_hooks_that_nothing_would_call():
    with pytest.raises(InputError, match=r"Late: BNHooks after DefaultTrainer .* put it first"):

        class Late(Stock, BNHooks):
            pass


def test_hooks_for_a_config_without_our_keys():
    trainer = Mixed.__new__(Mixed)
    trainer.cfg = get_cfg()
    with pytest.raises(InputError, match="call bn_det.add_bn_det_config"):
        trainer.build_hooks()


@pytest.mark.parametrize("name", ["RETINANET", "NF"])
def test_keys_that_a_project_has_replaced(make_cfg, name):
    """Found by whatever builds a part of the model."""
    cfg = make_cfg()
    cfg.MODEL[name] = type(cfg)({"NORM": "BN"})
    with pytest.raises(InputError, match=f"MODEL.{name}.* call bn_det.add_bn_det_config"):
        Stock.build_model(cfg)


def data_of(batches):
    """Batches without end, as for any hook."""
    while True:
        yield from copy.deepcopy(batches)


def test_what_fvcore_gets_right(make_cfg):
    """In the trainer as it is: its statistics are those of our PreciseBN."""
    cfg = make_cfg(*PLAIN)
    trainer = Stock(cfg)
    (hook,) = (h for h in trainer._hooks if type(h).__name__ == "PreciseBN")
    assert not isinstance(hook, PreciseBN)
    batches = [d2_models.make_batch([2, 3]) for _ in range(3)]
    ours = copy.deepcopy(trainer.model)
    hook._data_loader = data_of(batches)
    torch.manual_seed(1)  # the sampling of RoIs
    hook.update_stats()
    torch.manual_seed(1)
    update_bn_stats(ours, data_of(batches), 3)
    found, expected = trainer.model.state_dict(), ours.state_dict()
    names = [name for name in expected if "running_" in name]
    assert {
        "roi_heads.box_head.conv1.norm.running_var",
        "backbone.fpn_output2.norm.running_var",
    } < {*names}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


class Twice(nn.Module):
    """A layer that sees what another of its kind has normalized."""

    def __init__(self, kind, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(KINDS[kind](**kwargs).double() for _ in range(2))

    def forward(self, xs):
        for layer in self.layers:
            xs = [x.relu() + 0.1 * x**2 for x in call(layer, xs, SOURCES)]
        return xs


ONES = {
    **{kind: {} for kind in KINDS},
    **{"renorm": {"renorm": (3.0, 5.0)}, "no update": {"update_population": False}},
    **{"population": {"train_statistics": "population"}, "group": {"group": "world"}},
    **{"eval": {"eval_statistics": "batch"}, "momentum": {"momentum": 0.7}},
}
"""Kinds, and the choices of a plain layer."""


@pytest.mark.parametrize("name", ONES)
def test_what_is_refused_is_what_fvcore_gets_wrong(name):
    """It fails, or ends with other statistics than ours, which are right by other tests."""
    model = Twice(name if name in KINDS else "plain", **ONES[name])
    batches = [[x.detach() for x in inputs_of(name, seed)] for seed in range(4)]
    ours = copy.deepcopy(model)
    update_bn_stats(ours, batches, 4)
    try:
        fvcore.nn.update_bn_stats(model, batches, 4)
        found, expected = model.state_dict(), ours.state_dict()
        close = partial(torch.allclose, rtol=1e-9, atol=1e-12)
        right = all(close(found[k], v) for k, v in expected.items() if "running_" in k)
    except (AssertionError, TypeError):
        right = False
    assert right == all(map(suits_fvcore, model.layers))
    assert right == (name in ("plain", "group", "eval", "momentum"))


def statistics(trainer):
    return {k: v for k, v in trainer.model.state_dict().items() if "running_" in k}


OPTS = [
    *("TEST.PRECISE_BN.IMS_PER_BATCH", "3", "SOLVER.VIRTUAL_IMAGES", "4", "DATASETS.TEST", "()"),
    *("SOLVER.FREEZE_BN_ITER", "1", "SOLVER.FREEZE_BN_PRECISE", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"),
]


def test_with_our_hooks(make_cfg):
    """A DefaultTrainer then ends with the statistics of our Trainer, by its own loader."""
    found = []
    LOADED.clear()
    for kind in (Trainer, Mixed):
        cfg = make_cfg(*OPTS, "SEED", "1")
        seed_all_rng(1)
        trainer = kind(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        found.append((trainer, statistics(trainer)))
    (trainer, expected), (mixed, statistics_of_mixed) = found
    assert [type(h) for h in mixed._hooks] == [type(h) for h in trainer._hooks]
    assert expected.keys() == statistics_of_mixed.keys() and len(expected) > 40
    for name, value in expected.items():
        assert torch.equal(statistics_of_mixed[name], value), name
    assert sorted(LOADED) == [2, 3, 4]
    assert mixed.model.backbone.bottom_up.stem.conv1.norm.thawed_type is BatchNorm2d


class WithLoader(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        LOADED.append((cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.CATEGORIES_PER_BATCH))
        return super().build_train_loader(cfg)


def test_our_trainer_with_a_loader_of_a_project(make_cfg):
    """It is PreciseBN's, too, and that of extra images; which are of any categories."""
    LOADED.clear()
    WithLoader(make_cfg(*OPTS, "DATALOADER.CATEGORIES_PER_BATCH", "1"))
    assert sorted(LOADED) == [(2, 1), (3, 0), (4, 0)]


def test_nothing_to_resume(make_cfg, tmp_path):
    """As Detectron2's it begins from MODEL.WEIGHTS then, of which some may begin anew."""
    trainer = Trainer(make_cfg())
    state = {n: v for n, v in trainer.model.state_dict().items() if n.startswith("backbone")}
    first = next(name for name, value in state.items() if value.is_floating_point())
    state[first] = torch.full_like(state[first], 0.5)
    torch.save(state, tmp_path / "backbone.pth")
    trainer = Trainer(make_cfg("MODEL.WEIGHTS", str(tmp_path / "backbone.pth")))
    trainer.resume_or_load()
    assert trainer.start_iter == 0
    assert torch.equal(trainer.model.state_dict()[first], state[first])


def test_a_data_set_that_only_has_a_function(make_cfg):
    """Detectron2 asks for no metadata to train on it, nor for a file to evaluate on it."""
    cfg = make_cfg()
    records = DatasetCatalog.get("tiny_train")
    DatasetCatalog.register("of_a_function", lambda: records)
    try:
        MetadataCatalog.get("of_a_function").set(evaluator_type="coco")
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("of_a_function",)
        check_data(cfg)
        assert len(next(iter(Trainer.build_train_loader(cfg)))) == 2
    finally:
        DatasetCatalog.remove("of_a_function")
        MetadataCatalog.remove("of_a_function")


def test_layers_over_processes_know_their_names(make_cfg):
    norms = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.RETINANET.NORM", "SyncBN")
    trainer = Mixed(make_cfg(*norms, "SOLVER.SYNC_BN_TIMEOUT", "60.0"))
    layers = {n: m for n, m in trainer.model.named_modules() if isinstance(m, BatchNorm2d)}
    assert len(layers) > 20 and all(m.name == n for n, m in layers.items())
    assert {layer.timeout for layer in layers.values()} == {60.0}


def test_the_config_is_as_it_was_where_a_projects_hooks_fail(make_cfg):
    class Broken(Stock):
        def build_hooks(self):
            raise KeyError("of the project")

    class MixedBroken(BNHooks, Broken):
        pass

    trainer = MixedBroken.__new__(MixedBroken)
    trainer.cfg = cfg = make_cfg()
    with pytest.raises(KeyError, match="of the project"):
        trainer.build_hooks()
    assert trainer.cfg is cfg


@pytest.mark.parametrize(
    "key, value, with_hooks",
    [
        ("SOLVER.FREEZE_BN_ITER", "1", True),
        ("SOLVER.FREEZE_BN_MODULES", "('backbone',)", True),
        ("SOLVER.TUNE_BN", "True", True),
        ("SOLVER.VIRTUAL_IMAGES", "2", True),
        ("SOLVER.SYNC_BN_TIMEOUT", "60.0", True),
        ("SOLVER.ACCUMULATE", "2", False),
        ("SOLVER.AGC.ENABLED", "True", False),
        ("DATALOADER.CATEGORIES_PER_BATCH", "1", False),
    ],
)
def test_keys_that_a_trainer_does_not_read(make_cfg, key, value, with_hooks):
    """They are refused as its model is built; BNHooks reads what is a hook."""
    cfg = make_cfg(key, value, "TEST.PRECISE_BN.ENABLED", "False")
    with pytest.raises(InputError, match=f"{key}: .* does nothing in Stock, a DefaultTrainer: "):
        Stock(cfg)
    if with_hooks:
        assert Mixed(cfg)
    else:
        with pytest.raises(InputError, match="use bn_det.d2.train.Trainer"):
            Mixed(cfg)
    Trainer(cfg)


def of_a_project(cfg, *opts):
    """With options that no command of ours has looked at."""
    cfg.defrost()
    cfg.merge_from_list(list(opts))
    return cfg


IN_VAIN = {
    "MODEL.META_ARCHITECTURE": ("RetinaNet", "MODEL.RETINANET.BN.STATISTICS", "shared"),
    "MODEL.BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone", "MODEL.FPN.NORM", "GhostBN"),
}


@pytest.mark.parametrize("stock", IN_VAIN)
@pytest.mark.parametrize("cls", [Trainer, Mixed])
def test_keys_that_a_stock_component_does_not_read(stock, cls, make_cfg, caplog):
    """A warning, before Detectron2 fails on a norm that it does not know."""
    name, key, value = IN_VAIN[stock]
    cfg = of_a_project(make_cfg("TEST.PRECISE_BN.ENABLED", "False"), stock, name, key, value)
    with pytest.raises(KeyError, match=value) if value == "GhostBN" else nullcontext():
        cls.build_model(cfg)
    (message,) = [m for m in caplog.messages if m.startswith(f"{key}: {value!r}")]
    assert f"{stock} {name!r}" in message


def test_a_precision_that_is_none(make_cfg):
    cfg = of_a_project(make_cfg(), "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bf16")
    words = r"AMP.DTYPE: 'bf16' is not accepted; use one of \['float16'"
    with pytest.raises(InputError, match=words):
        Trainer(cfg)


def test_a_script_of_a_project_logs_as_with_detectron2s(make_cfg, tmp_path):
    """Iterations and AP, in a process that sets up no logs."""
    cfg = make_cfg("DATASETS.TEST", "()")
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from detectron2.config import get_cfg\n"
        "import bn_det.d2\n"
        "from bn_det.d2.train import Trainer\n"
        "cfg = get_cfg()\n"
        "bn_det.add_bn_det_config(cfg)\n"
        "cfg.merge_from_file(sys.argv[1])\n"
        "bn_det.d2.register_datasets(cfg)\n"
        "Trainer(cfg).train()\n"
    )
    command = sys.executable, tmp_path / "script.py", tmp_path / "cfg.yaml"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    for words in ("Starting training from iteration 0", "iter: 1", "PreciseBN took "):
        assert words in log
