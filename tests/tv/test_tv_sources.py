"""Statistics for each source of images, on the torchvision host."""

import copy
import json

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from bn_det import BatchNorm2d, SourceBatchNorm2d
from bn_det.config.load import load_config
from bn_det.errors import InputError
from bn_det.layers import record_sources
from bn_det.tv import build_model, get_cfg
from bn_det.tv.evaluation import predict
from bn_det.tv.trainer import Trainer, load_datasets
from reference import BAD_SOURCES, BASE, RCNN, TWO_SOURCES

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("MODEL.BN_SOURCES.PARTS", "['RESNETS', 'FPN', 'RETINANET']")


@pytest.fixture
def make_cfg(tiny_shapes, tmp_path):
    def make(*opts):
        cfg = get_cfg()
        small = ["SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", str(tmp_path)]
        small += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
        opts = ["MODEL.DEVICE", "cpu", *tiny_shapes, *TWO_SOURCES, *small, *opts]
        load_config(cfg, BASE, opts, "torchvision")
        return cfg

    return make


def test_training_and_evaluation(make_cfg, tmp_path):
    """Batches of both sources, PreciseBN of each, and a test set of one."""
    precise = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "3"]
    trainer = Trainer(make_cfg(*PARTS, *precise))
    seen = set()
    run_step = trainer.run_step

    def note(batches):
        seen.update(tuple(record["source"] for _, _, record in batch) for batch in batches)
        return run_step(batches)

    trainer.run_step = note
    trainer.train()
    assert any(len(set(sources)) == 2 for sources in seen)
    layers = [m for m in trainer.model.modules() if isinstance(m, SourceBatchNorm2d)]
    assert {layer.num_levels for layer in layers} == {None, 5}
    for layer in layers:
        mean, other = (layer.get_submodule(str(k)).running_mean for k in range(2))
        assert not torch.equal(mean, other)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [m["precise_bn/num_batches"] for m in metrics if "precise_bn/num_batches" in m] == [3]
    assert any("bbox/AP" in m for m in metrics)


def test_each_source_is_detected_with_its_own_statistics(make_cfg):
    cfg = make_cfg(*PARTS, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    model = build_model(cfg)
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
    states = []
    for source in ("0", "1"):
        state = {}
        for key, value in model.state_dict().items():
            *module, number, name = key.split(".")
            if not name.startswith(("running", "num_batches")):
                state[key] = value
            elif number == source:
                state[".".join([*module, name])] = value
        states.append(state)
    single = build_model(make_cfg("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")).eval()
    image = torch.rand(3, 128, 128) * 255
    for source, state in enumerate(states):
        single.load_state_dict(state)
        with record_sources([{"source": source}]):
            (found,) = model.eval()([image])
        (expected,) = single([image])
        assert len(found["boxes"]) > 0
        torch.testing.assert_close(found, expected)
    # And back: each source begins with the statistics of a model without sources.
    again = build_model(cfg).eval()
    again.load_state_dict(copy.deepcopy(states[1]))
    with record_sources([{"source": 0}]):
        torch.testing.assert_close(again([image]), [expected])


def test_rcnn(make_cfg):
    opts = [*RCNN, "MODEL.META_ARCHITECTURE", "BNGeneralizedRCNN", "MODEL.MASK_ON", "False"]
    opts += ["MODEL.BN_SOURCES.PARTS", "['RESNETS', 'FPN']", "MODEL.BACKBONE.FREEZE_AT", "2"]
    opts += ["MODEL.BN_SOURCES.AFFINE", "per_domain"]
    cfg = make_cfg(*opts, "SOLVER.MAX_ITER", "1")
    trainer = Trainer(cfg)
    trainer.train()
    body = trainer.model.backbone.body
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert isinstance(body.layer1[0].bn1, FrozenBatchNorm2d)
    assert isinstance(body.layer2[0].bn1, SourceBatchNorm2d)
    assert body.layer2[0].bn1.weight is None


def test_images_of_no_source(make_cfg):
    cfg = make_cfg(*PARTS)
    (dataset,) = load_datasets(cfg, "TEST")
    dataset.records[0]["source"] = None
    with pytest.raises(InputError, match="image 0 of the batch is of source None, .*SOURCES"):
        predict(build_model(cfg), [[(torch.rand(3, 64, 64), {}, dataset.records[0])]], dataset)


@pytest.mark.parametrize("opts, message", BAD_SOURCES)
def test_what_is_refused(make_cfg, opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg("MODEL.BN_SOURCES.PARTS", "['RETINANET']", *opts)
