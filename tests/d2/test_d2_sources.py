"""Statistics for each source of images, on Detectron2."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from itertools import chain

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from bn_det import SourceBatchNorm2d
from bn_det.config.load import load_config
from bn_det.d2 import add_bn_det_config, register_datasets
from bn_det.errors import InputError
from reference import BAD_SOURCES, BASE, RCNN, TWO_SOURCES

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("MODEL.BN_SOURCES.PARTS", "['RESNETS', 'FPN', 'RETINANET']")


@pytest.fixture
def make_cfg(tiny_shapes, tmp_path):
    def make(*opts):
        cfg = get_cfg()
        add_bn_det_config(cfg)
        small = ["SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", str(tmp_path)]
        opts = ["MODEL.DEVICE", "cpu", *tiny_shapes, *TWO_SOURCES, *small, *opts]
        load_config(cfg, BASE, opts, "Detectron2")
        return cfg

    return make


def source_layers(model):
    return [m for m in model.modules() if isinstance(m, SourceBatchNorm2d)]


def test_registered_data_sets_name_their_source(make_cfg):
    register_datasets(make_cfg())
    assert {d["source"] for d in DatasetCatalog.get("tiny_val")} == {1}
    # Of another config in the same process, whatever was registered in between.
    swapped = "[['b', 'tiny_val'], ['a', 'tiny_train']]"
    register_datasets(make_cfg("DATASETS.SOURCES", swapped))
    assert {d["source"] for d in DatasetCatalog.get("tiny_val")} == {0}
    assert {d["source"] for d in DatasetCatalog.get("tiny_train")} == {1}
    with pytest.raises(InputError, match="DATASETS.SOURCES: 'tiny_vall' is not a registered"):
        register_datasets(make_cfg("DATASETS.SOURCES", "[['b', 'tiny_vall']]"))


@pytest.mark.parametrize("architecture", ["BNRetinaNet", "BNGeneralizedRCNN"])
def test_in_an_unmodified_trainer(make_cfg, architecture):
    opts = PARTS
    if architecture == "BNGeneralizedRCNN":
        opts = [*RCNN, "MODEL.META_ARCHITECTURE", architecture, "MODEL.MASK_ON", "False"]
        opts += ["MODEL.BN_SOURCES.PARTS", "['RESNETS', 'FPN']"]
    cfg = make_cfg(*opts, "DATASETS.TEST", "()")
    register_datasets(cfg)
    trainer = DefaultTrainer(cfg)
    trainer.train()
    layers = source_layers(trainer.model)
    assert {layer.num_levels for layer in layers} >= {None}
    for layer in layers:
        mean, other = (layer.get_submodule(str(k)).running_mean for k in range(2))
        assert mean.any() and other.any() and not torch.equal(mean, other)


def test_a_batch_of_two_sources_is_two_batches_in_turn(make_cfg):
    """What the images of one source give does not depend on the others in the batch."""
    model = build_model(make_cfg(*PARTS))
    records = [
        {"image": torch.randint(0, 256, (3, 128, 128)), "source": k, "height": 128, "width": 128}
        for k in (1, 0, 1, 0)
    ]
    features = {}
    model.head.register_forward_hook(lambda _, args, out: features.update(head=out))
    model.eval()
    for layer in source_layers(model):
        layer.eval_statistics = "batch"
    with torch.no_grad(), EventStorage():
        model(copy.deepcopy(records))
        mixed = features["head"]
        for k in range(2):
            model(copy.deepcopy([r for r in records if r["source"] == k]))
            for got, expected in zip(chain(*mixed), chain(*features["head"]), strict=True):
                mine = [i for i, r in enumerate(records) if r["source"] == k]
                torch.testing.assert_close(got[mine], expected, rtol=1e-4, atol=1e-4)


def test_images_of_no_source(make_cfg):
    model = build_model(make_cfg(*PARTS)).eval()
    image = {"image": torch.randint(0, 256, (3, 64, 64))}
    with pytest.raises(InputError, match="image 0 of the batch is of source None, .*'source'"):
        model([image])


@pytest.mark.parametrize("opts, message", BAD_SOURCES)
def test_what_is_refused(make_cfg, opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg("MODEL.BN_SOURCES.PARTS", "['RETINANET']", *opts)
