"""A Detectron2 project whose config has keys of our names, added before or after ours."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from bn_det.d2 import BNHooks, BNRetinaNet, add_bn_det_config
from bn_det.d2.train import Trainer
from bn_det.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def add_project_config(cfg):
    """Nodes that are made anew, and keys below Detectron2's own, two of them with our names."""
    cfg.MODEL.FCOS = CfgNode({"NORM": "GN", "NUM_CONVS": 2, "NUM_CLASSES": 3})
    cfg.SOLVER.ACCUMULATE = 4  # which the project's own loop reads
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.TEST.BN_MONITOR = 50


ADDS = {
    "theirs first": (add_project_config, add_bn_det_config),
    "ours first": (add_bn_det_config, add_project_config),
}


@pytest.fixture(params=ADDS)
def cfg(request, tmp_path):
    cfg = get_cfg()
    for add in ADDS[request.param]:
        add(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "BNRetinaNet", "cpu", ""
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


class Stock(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return [None]


def test_both_keep_their_keys(cfg):
    assert cfg.MODEL.FCOS == {"NORM": "GN", "NUM_CONVS": 2, "NUM_CLASSES": 3}
    assert (cfg.MODEL.BN_FCOS.NORM, cfg.MODEL.BN_FCOS.NUM_CONVS) == ("GN", 4)
    assert (cfg.SOLVER.ACCUMULATE, cfg.TEST.BN_MONITOR) == (4, 50)
    assert cfg.SOLVER.AGC.ENABLED is False and cfg.SOLVER.OPTIMIZER == "ADAMW"


def test_a_key_that_the_project_reads(cfg):
    """It is refused until the trainer says that it is read, as ours would do nothing there."""
    message = (
        "SOLVER.ACCUMULATE: 4 does nothing in Stock, a DefaultTrainer: use "
        "bn_det.d2.train.Trainer .*; if it is a key of your own that Stock reads, list it in its "
        "class, as reads_keys"
    )
    with pytest.raises(InputError, match="TEST.BN_MONITOR: 50 does nothing in Stock"):
        Stock(cfg)
    cfg.TEST.BN_MONITOR = 100
    with pytest.raises(InputError, match=message):
        Stock(cfg)

    class Theirs(Stock):
        reads_keys = ("SOLVER.ACCUMULATE",)

    assert isinstance(Theirs(cfg).model, BNRetinaNet)


def test_with_our_hooks(cfg):
    class Theirs(BNHooks, Stock):
        reads_keys = (*BNHooks.reads_keys, "SOLVER.ACCUMULATE")

    trainer = Theirs(cfg)
    assert [hook.period for hook in trainer._hooks if type(hook).__name__ == "Monitor"] == [50]
    assert "SOLVER.ACCUMULATE" in Trainer.reads_keys


def test_a_node_of_theirs_in_place_of_ours(cfg):
    """Named, with the line that mends it."""
    cfg.SOLVER.AGC = CfgNode({"CLIPPING": 0.01})

    class Theirs(BNHooks, Stock):
        reads_keys = (*BNHooks.reads_keys, "SOLVER.ACCUMULATE")

    with pytest.raises(InputError, match=r"SOLVER.AGC.ENABLED: .*call bn_det.add_bn_det_config"):
        Theirs(cfg)
    add_bn_det_config(cfg)
    assert cfg.SOLVER.AGC.CLIPPING == 0.01
    assert not any(torch.isnan(p).any() for p in Theirs(cfg).model.parameters())
