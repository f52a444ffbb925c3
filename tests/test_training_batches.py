"""What a training's batches are made of, and the EMA that they update, on both hosts."""

import importlib
from itertools import islice

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bn_det.data.category_batches import category_of
from bn_det.data.coco import load_coco, registered_sources
from bn_det.errors import InputError
from hosts import HOSTS, build_model, every_host, make_cfg
from ranks import run_ranks
from reference import BASE

PAIRS = ("DATALOADER.CATEGORIES_PER_BATCH", "2", "SOLVER.MAX_ITER", "12")


def image_ids(host, cfg, num_batches=12):
    """Of each batch of this process."""
    if host == "torchvision":
        module = importlib.import_module("bn_det.tv.trainer")
        loader = module.build_train_loader(cfg, module.load_datasets(cfg, "TRAIN"), 3, 0)
        size = loader.batch_size
        assert len(loader) == 12
        ids = [[record["image_id"] for _, _, record in batch] for batch in loader]
        assert all(len(batch) == size for batch in ids)
        return ids[:num_batches]
    module = importlib.import_module("bn_det.d2.train")
    module.register_datasets(cfg)
    loader = module.Trainer.build_train_loader(cfg)
    return [[x["image_id"] for x in batch] for batch in islice(loader, num_batches)]


def of_rank(rank, host, opts):
    return image_ids(host, make_cfg(host, BASE, *opts))


@every_host
def test_batches_of_few_categories(host, tiny_shapes):
    opts = [*tiny_shapes, *PAIRS, "SOLVER.IMS_PER_BATCH", "4", "SEED", "3"]
    cfg = make_cfg(host, BASE, *opts)
    dataset = load_coco("tiny_train", registered_sources(cfg)["tiny_train"])
    categories = {r["image_id"]: category_of(r) for r in dataset.records}
    batches = image_ids(host, cfg)
    for batch in batches:
        a, b, c, d = (categories[i] for i in batch)
        assert len(set(batch)) == 4 and (a, b) == (c, d) and a != b
    assert len({tuple(batch) for batch in batches}) > 6, "they are drawn at random"
    assert image_ids(host, cfg) == batches, "by the seed"


@pytest.mark.parametrize("host", HOSTS)
def test_each_process_has_batches_of_few_categories(host, tiny_shapes):
    opts = [*tiny_shapes, *PAIRS, "SOLVER.IMS_PER_BATCH", "8", "SEED", "3"]
    cfg = make_cfg(host, BASE, *opts)
    dataset = load_coco("tiny_train", registered_sources(cfg)["tiny_train"])
    categories = {r["image_id"]: category_of(r) for r in dataset.records}
    ranks = run_ranks(of_rank, 2, host, opts, timeout=120)
    assert ranks[0] != ranks[1]
    for batch in (*ranks[0], *ranks[1]):
        a, b, c, d = (categories[i] for i in batch)
        assert (a, b) == (c, d) and a != b


@every_host
def test_batches_that_cannot_be(host, tiny_shapes):
    opts = [*tiny_shapes, *PAIRS, "SOLVER.IMS_PER_BATCH", "5"]
    with pytest.raises(InputError, match="2 is not accepted with batches of 5 images"):
        image_ids(host, make_cfg(host, BASE, *opts))
    with pytest.raises(InputError, match=r"DATALOADER.CATEGORIES_PER_BATCH: -1 is not accepted"):
        make_cfg(host, BASE, "DATALOADER.CATEGORIES_PER_BATCH", "-1")


@every_host
def test_momentum_of_the_ema(host, one_thread):
    """Every BatchNorm of ours has it, and one step on a batch follows the rule."""
    cfg = make_cfg(host, BASE, "SOLVER.BN_MOMENTUM", "0.01")
    model = build_model(host, cfg)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert len(layers) > 20
    assert all(m.momentum == 0.01 for m in layers if hasattr(m, "eval_statistics"))
    layer = next(m for m in layers if type(m).__name__ == "BatchNorm2d")
    x = torch.randn(4, layer.num_features, 5, 5) + 3
    layer.train()(x)
    torch.testing.assert_close(layer.running_mean, 0.01 * x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.99 + 0.01 * x.var((0, 2, 3)))


@pytest.mark.parametrize("value", ["0.0", "1.5", "-0.1"])
def test_bad_momentum(value):
    with pytest.raises(InputError, match=r"SOLVER.BN_MOMENTUM: .* use more than 0.0"):
        make_cfg("torchvision", BASE, "SOLVER.BN_MOMENTUM", value)
