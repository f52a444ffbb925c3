"""Every config, as configs/README.md has it: on each of its hosts a model, a step, an inference.

The model is in full size and without any numbers; the step and the inference are of a smaller one.
"""

import numpy as np
import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, SourceBatchNorm2d, image_sources
from bn_det.config.parts import LEVEL_PARTS, PARTS
from bn_det.config.table import OTHER_WEIGHTS, head_comment
from bn_det.data import CategoryBatches, builtin_sources
from bn_det.doctor.from_training import of_optimizer
from bn_det.errors import InputError
from bn_det.layers.shuffle import is_shuffled
from bn_det.training.agc import AdaptiveGradientClipping
from bn_det.training.hooks import (
    AverageStatistics,
    FreezeBN,
    PreciseBN,
    RenormSchedule,
    VirtualBatch,
)
from built import CONFIGS, HOSTS_OF, count, norms_in, parts_of, read_table, stages_of
from hosts import build_model, make_cfg, torchvision
from reference import TWO_SOURCES

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = read_table()
CASES = [
    pytest.param(row, *host.values, marks=host.marks, id=f"{row.path}-{host.values[0]}")
    for row in TABLE.values()
    for host in HOSTS_OF[row.hosts]
]
ONE_HOST = [row for row in TABLE.values() if torchvision not in HOSTS_OF[row.hosts]]
SMALL = [
    *("MODEL.WEIGHTS", "", "MODEL.NF.PRETRAINED", "", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.NF.NAME", "test_nfnet"),
    *("SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()", "TEST.DETECTIONS_PER_IMAGE", "20"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "64", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "100", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    # Untrained detectors are to detect something, and activations not to grow without a norm.
    *("MODEL.PIXEL_STD", "[64.0, 64.0, 64.0]", "SEED", "1"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.BN_FCOS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]
"""What makes a config small."""


def options(row, host, tiny_shapes, folder):
    size = "64"
    if row["MODEL.RETINANET.GHOST_SIZE"] == 1:
        size = "192"  # a single image has to have two values at p7
    options = [*tiny_shapes, *SMALL, "OUTPUT_DIR", str(folder)]
    options += ["INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MAX_SIZE_TRAIN", size]
    if row.path.startswith("blood_cells"):  # of three kinds of cells; there are four of shapes
        options += ["MODEL.RETINANET.NUM_CLASSES", "4", "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    if row["MODEL.BN_SOURCES.PARTS"]:
        options += TWO_SOURCES
    if row.hosts == OTHER_WEIGHTS and host == "torchvision":
        options += ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    return options


def make_trainer(host, cfg):
    if host == "torchvision":
        from bn_det.tv.trainer import Trainer
    else:
        from bn_det.d2 import register_datasets
        from bn_det.d2.train import Trainer

        register_datasets(cfg)
        np.random.seed(0)  # the order of its data
    trainer = Trainer(cfg)
    trainer.checkpointer.save_to_disk = False
    return trainer


@pytest.mark.parametrize("row, host", CASES)
def test_config(row, host, tiny_shapes, tmp_path, monkeypatch):
    check_config(row, make_cfg(host, CONFIGS / row.path))
    check_model(row, host)
    cfg = make_cfg(host, CONFIGS / row.path, *options(row, host, tiny_shapes, tmp_path))
    trainer = make_trainer(host, cfg)
    check_schedule(row, trainer)
    assert list(of_optimizer(trainer.model, trainer.optimizer)) == []
    check_hooks(row, trainer._hooks)
    images = check_step(row, trainer, parts_of(host, trainer.model), monkeypatch)
    check_inference(row, host, cfg, trainer.model, images)


def check_model(row, host):
    opts = ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", "", "MODEL.NF.PRETRAINED", ""]
    if row.hosts == OTHER_WEIGHTS and host == "torchvision":
        opts += ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    with torch.device("meta"):
        model = build_model(host, make_cfg(host, CONFIGS / row.path, *opts))
    parts = parts_of(host, model)
    check_detector(row, host, model, parts)
    for name, part in parts.items():
        check_norms(row, name, part)
        check_choices(row, name, part)


def check_config(row, cfg):
    """What is exchanged for what is small."""
    assert int(row.schedule["images"]) == cfg.SOLVER.IMS_PER_BATCH
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(builtin_sources())
    assert list(cfg.DATASETS.TRAIN) == [f"{name}_train" for name in row.data]
    weights = cfg.MODEL.NF.PRETRAINED if row.detector["net"] in BLOCKS else cfg.MODEL.WEIGHTS
    assert row.detector["begin"] == ("pre-trained" if weights else "from scratch")
    assert set(row.choices) <= CHECKED, "say here what it does to the model"


CONVS = {"R-18": 20, "R-50": 53}
BLOCKS = {"nf_resnet26": 8, "nf_resnet50": 16}


def check_detector(row, host, model, parts):
    assert set(parts) == set(row.norms)
    body, net = parts["RESNETS"], row.detector["net"]
    if net in BLOCKS:
        assert sum(type(m).__name__ == "NormFreeBlock" for m in body.modules()) == BLOCKS[net]
    else:
        assert count(body, nn.Conv2d) == CONVS[net]
    frozen = [not any(p.requires_grad for p in s.parameters()) for s in stages_of(host, body)]
    assert frozen == [k < row.freeze_at for k in range(5)]
    name, box = row.detector["name"], parts.get("ROI_BOX_HEAD")
    assert name.startswith("Cascade") == isinstance(box, nn.ModuleList)
    assert ("Mask" in name) == ("ROI_MASK_HEAD" in parts)
    heads = box if isinstance(box, nn.ModuleList) else [box] if box is not None else []
    for head in heads:
        assert count(head, nn.Conv2d) == int(row.detector["convs"] or 0)
        assert count(head, nn.Linear) == int(row.detector["fcs"])


WITHOUT = {
    **{"RESNETS": 0, "RETINANET": 2, "BN_FCOS": 3, "RPN": 2},
    **{"ROI_BOX_HEAD": 0, "ROI_MASK_HEAD": 1},
}
"""How many convolutions of a part have no norm: the final ones."""


def hidden_convolutions(row, name, part):
    # A dense detector's p6 and p7 have none.
    without = {**WITHOUT, "FPN": 0 if "RPN" in row.norms else 2}[name]
    return count(part, nn.Conv2d) - without


def check_norms(row, name, part):
    """The norm of every hidden convolution, and what levels and sources share."""
    norm, found = row.norms[name], norms_in(part)
    assert set(found.values()) == ({norm} - {"none"})
    layers = len(found)
    if norm == "L1BN" and name in LEVEL_PARTS:
        layers /= 5  # of which each level has its own
    assert layers == (0 if norm == "none" else hidden_convolutions(row, name, part))
    has_sources = name in row["MODEL.BN_SOURCES.PARTS"]
    for layer in found:
        if not isinstance(layer, BatchNorm2d):
            assert name not in row.levels
            continue
        assert isinstance(layer, SourceBatchNorm2d) == has_sources
        if has_sources:
            assert layer.num_sources == len(row["DATASETS.SOURCES"])
            assert layer.num_levels == (5 if name in LEVEL_PARTS else None)
        if name in LEVEL_PARTS or not has_sources:
            assert sharing(layer) == row.levels.get(name, ALL_SHARED)
        if not has_sources:
            tells_apart = name in LEVEL_PARTS or sharing(layer) != ALL_SHARED
            assert isinstance(layer, DomainBatchNorm2d) == tells_apart


ALL_SHARED = "shared-shared-shared"


def sharing(layer):
    if not isinstance(layer, DomainBatchNorm2d):
        return ALL_SHARED
    return f"{layer.statistics}-{layer.population}-{layer.affine_sharing}"


PART_KEYS = ("GHOST_SIZE", "GHOST_ORDER", "WEIGHT_NORM")
CHECKED = {
    *(f"MODEL.{part}.{key}" for part in PARTS for key in PART_KEYS),
    *("MODEL.ROI_BOX_HEAD.SHUFFLE", "MODEL.ROI_MASK_HEAD.SHUFFLE"),
    *("MODEL.BN_SOURCES.PARTS", "DATASETS.SOURCES"),
    *("TEST.BN_STATISTICS", "TEST.BN_STATISTICS_PARTS", "SOLVER.BN_STATISTICS"),
    *("SOLVER.UPDATE_POPULATION", "SOLVER.ACCUMULATE", "SOLVER.AGC.ENABLED"),
    *("SOLVER.VIRTUAL_IMAGES", "SOLVER.FREEZE_BN_ITER", "TEST.EVAL_PERIOD"),
    *("SOLVER.BN_MOMENTUM", "DATALOADER.CATEGORIES_PER_BATCH"),
    *(f"SOLVER.BRN.{key}" for key in ("WARMUP_ITERS", "R_MAX_ITER", "D_MAX_ITER")),
    *(f"TEST.PRECISE_BN.{key}" for key in ("ENABLED", "NUM_ITER", "TOLERANCE", "IMS_PER_BATCH")),
}
"""The keys that the tests look for in what is built."""


def check_choices(row, name, part):
    """Those of a part's layers."""
    is_ghost = row.norms[name] == "GhostBN"
    for layer in norms_in(part):
        if isinstance(layer, BatchNorm2d):
            assert layer.ghost_size == (row[f"MODEL.{name}.GHOST_SIZE"] if is_ghost else None)
            assert layer.ghost_order == row[f"MODEL.{name}.GHOST_ORDER"]
            assert layer.momentum == row["SOLVER.BN_MOMENTUM"]
            assert layer.update_population == row["SOLVER.UPDATE_POPULATION"]
            assert layer.eval_statistics == statistics(row, name, "TEST", "population")
            assert layer.train_statistics == statistics(row, name, "SOLVER", "batch")
    kind = row[f"MODEL.{name}.WEIGHT_NORM"]
    kinds = [m.weight_norm for m in part.modules() if hasattr(m, "weight_norm")]
    assert set(kinds) == ({kind} - {""})
    assert not kind or len(kinds) >= hidden_convolutions(row, name, part)
    assert is_shuffled(part) == row.choices.get(f"MODEL.{name}.SHUFFLE", False)


def statistics(row, name, node, default):
    parts = row[f"{node}.BN_STATISTICS_PARTS"] or PARTS
    return row[f"{node}.BN_STATISTICS"] if name in parts else default


def check_schedule(row, trainer):
    iterations, rate = int(row.schedule["iterations"]), float(row.schedule["rate"])
    assert trainer.max_iter == iterations
    if row.schedule["falls"] == "cosine":
        assert rate_at(trainer, iterations // 2) == pytest.approx(rate / 2)
        return
    for k, step in enumerate(map(int, row.schedule["falls"].split(", "))):
        assert rate_at(trainer, step - 1) == pytest.approx(rate * 0.1**k)
        assert rate_at(trainer, step) == pytest.approx(rate * 0.1 ** (k + 1))


def rate_at(trainer, iteration):
    scheduler = trainer.scheduler
    before, scheduler.last_epoch = scheduler.last_epoch, iteration
    try:
        return scheduler.get_lr()[0]
    finally:
        scheduler.last_epoch = before


def check_hooks(row, hooks):
    """Those that choices stand for are there, and no others."""
    of_kind = {
        kind: [h for h in hooks if isinstance(h, kind)]
        for kind in (FreezeBN, PreciseBN, RenormSchedule, VirtualBatch)
    }
    (average,) = (h for h in hooks if isinstance(h, AverageStatistics))
    assert (row["TEST.EVAL_PERIOD"] or average.periods[0]) in average.periods
    asked = row["SOLVER.FREEZE_BN_ITER"], row["TEST.PRECISE_BN.NUM_ITER"]
    freeze = [(h.iteration, h.precise.num_iter) for h in of_kind[FreezeBN]]
    assert freeze == ([asked] if row["SOLVER.FREEZE_BN_ITER"] else [])
    precise = [(h.num_iter, h.how["tolerance"]) for h in of_kind[PreciseBN]]
    asked = row["TEST.PRECISE_BN.NUM_ITER"], row["TEST.PRECISE_BN.TOLERANCE"]
    assert precise == ([asked] if row["TEST.PRECISE_BN.ENABLED"] else [])
    renorm = [(h.warmup_iters, h.r_max_iter, h.d_max_iter) for h in of_kind[RenormSchedule]]
    asked = tuple(row[f"SOLVER.BRN.{k}"] for k in ("WARMUP_ITERS", "R_MAX_ITER", "D_MAX_ITER"))
    assert renorm == ([asked] if "BRN" in row.norms.values() else [])
    assert len(of_kind[VirtualBatch]) == bool(row["SOLVER.VIRTUAL_IMAGES"])


def check_step(row, trainer, parts, monkeypatch):
    """Training of one iteration, with its hooks: what runs, and what moves.

    Both trainers raise FloatingPointError for a loss that is not finite.

    Returns:
        two images, of different sizes.
    """
    for hook in trainer._hooks:
        if isinstance(hook, PreciseBN):
            hook.num_iter = precise_passes(row)
    trainer.max_iter = 1
    passes = []
    trainer.model.register_forward_pre_hook(lambda _, args: passes.append(args[0]))
    clippings = spy(monkeypatch, AdaptiveGradientClipping, "__call__")
    draws = spy(monkeypatch, CategoryBatches, "draw")
    before = {p: p.detach().clone() for p in trainer.model.parameters()}
    stepped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(set(stepped))
    assert set(stepped) == {p for p in before if p.requires_grad}
    trainer.train()
    assert list(map(len, passes)) == list(images_of_passes(row))
    assert len(clippings) == row["SOLVER.AGC.ENABLED"]
    assert {d.num_categories for d in draws} == {row["DATALOADER.CATEGORIES_PER_BATCH"]} - {0}
    moved = {p for p, value in before.items() if not torch.equal(p, value)}
    assert moved <= set(stepped) and all(p.sum().isfinite() for p in moved)
    for name, part in parts.items():
        assert not moved.isdisjoint(part.parameters()), name
    first, second = (x["image"] if isinstance(x, dict) else x for x in passes[0][:2])
    return [first, second[:, :, :-16]]


def spy(monkeypatch, kind, method):
    """A list that gets the object with each call of a method."""
    calls, call = [], getattr(kind, method)

    def note(self, *args):
        calls.append(self)
        return call(self, *args)

    monkeypatch.setattr(kind, method, note)
    return calls


def images_of_passes(row):
    """How many images each forward pass of an iteration has."""
    if row["SOLVER.VIRTUAL_IMAGES"]:
        yield row["SOLVER.VIRTUAL_IMAGES"]
    yield from [2] * row["SOLVER.ACCUMULATE"]
    if row["TEST.PRECISE_BN.ENABLED"]:
        yield from [row["TEST.PRECISE_BN.IMS_PER_BATCH"] or 2] * precise_passes(row)


def precise_passes(row):
    """As many as p7, where an image has a single value, needs for a variance."""
    return 1 if row["TEST.PRECISE_BN.IMS_PER_BATCH"] else 4


def check_inference(row, host, cfg, model, images):
    detections = detect(host, model.eval(), images)
    assert len(detections) == 2
    (node,) = {"RETINANET", "BN_FCOS"} & set(row.norms) or {"ROI_HEADS"}
    num_classes = cfg.MODEL[node].NUM_CLASSES
    for image, (boxes, scores, classes, masks) in zip(images, detections, strict=True):
        number, (height, width) = len(boxes), image.shape[1:]
        assert 1 <= number <= 20
        assert boxes.shape == (number, 4) and boxes.isfinite().all()
        assert (boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert scores.shape == (number,) and ((scores >= 0) & (scores <= 1)).all()
        assert classes.shape == (number,) and not classes.is_floating_point()
        assert ((classes >= 0) & (classes < num_classes)).all()
        assert (masks is not None) == ("ROI_MASK_HEAD" in row.norms)
        assert masks is None or len(masks) == number


def detect(host, model, images):
    """Boxes, scores, classes, and masks or None, of each image."""
    with torch.no_grad(), image_sources([0, 1]):
        if host == "torchvision":
            keys = ("boxes", "scores", "labels", "masks")
            return [tuple(map(d.get, keys)) for d in model(images)]
        results = model([{"image": image, "source": k} for k, image in enumerate(images)])
    detections = [r["instances"].get_fields() for r in results]
    keys = ("scores", "pred_classes", "pred_masks")
    return [(d["pred_boxes"].tensor, *map(d.get, keys)) for d in detections]


@pytest.mark.parametrize("row", ONE_HOST, ids=lambda row: row.path)
def test_torchvision_refuses(row):
    with pytest.raises(InputError, match="'BNFCOS'|'BNCascadeROIHeads'"):
        build_model("torchvision", make_cfg("torchvision", CONFIGS / row.path))


def test_comments_name_the_host():
    """Who opens a file sees where it runs."""
    for row in TABLE.values():
        said = "For Detectron2 only." in head_comment((CONFIGS / row.path).read_text())
        assert said == (row in ONE_HOST), row.path


TABLE_5 = ["shared-shared", "shared-per_domain", "per_domain-shared", "per_domain-per_domain"]
"""Its rows: statistics in training, and population statistics; the affine is shared."""


def test_places_of_the_paper():
    """A config that names a table of the paper has what is in that table."""
    for row in TABLE.values():
        if row.path.startswith("multi_domain"):
            assert "Table 5, row " in row.reproduces, row.path
            line = TABLE_5[int(row.reproduces[-1]) - 1]
            affine = "per_domain" if row.reproduces.startswith("ours") else "shared"
            assert row.levels["RETINANET"] == f"{line}-{affine}", row.path
        elif "Table" in row.reproduces:
            assert row.path.startswith("leakage"), row.path
            assert {row.norms["ROI_BOX_HEAD"], row.norms["ROI_MASK_HEAD"]} <= {"BN", "SyncBN"}
            is_table_3 = row["TEST.BN_STATISTICS"] == "batch"
            assert is_table_3 == (row.reproduces == "Table 3"), row.path
            assert row.choices.get("MODEL.ROI_BOX_HEAD.SHUFFLE", False) == (
                row.reproduces == "Table 6 and Figure 9"
            ), row.path
