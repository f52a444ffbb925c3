"""Faster and Mask R-CNN: the torchvision host computes what Detectron2 does."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import argparse
import json
import re
from pathlib import Path

import detectron2.config
import detectron2.model_zoo
import detectron2.modeling
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import bn_det.d2
from bn_det.config.load import load_config
from bn_det.d2.train import setup
from bn_det.data.coco import check_num_classes, load_coco, registered_sources
from bn_det.data.masks import encode_mask
from bn_det.errors import InputError
from bn_det.tv import build_model, get_cfg
from bn_det.tv.config import check_cfg
from bn_det.tv.evaluation import coco_metrics
from bn_det.tv.masks import crop_masks, paste_mask
from bn_det.tv.pooler import RoIPooler
from bn_det.tv.rcnn import build_box_head, build_mask_head
from reference import BASE, RCNN, norm_opts

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDES = (4, 8, 16, 32)
NORMS = ["", "BN", "FrozenBN", "GN", "LN"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""The same in float32, but for the order of sums."""


def both_cfgs(*opts, stock=True):
    """Ours, and Detectron2's, which is with its stock components unless told otherwise."""
    ours, theirs = get_cfg(), detectron2.config.get_cfg()
    bn_det.d2.add_bn_det_config(theirs)
    for cfg, host in ((ours, "torchvision"), (theirs, "Detectron2")):
        load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", *RCNN, *opts], host)
    if stock:
        theirs.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        theirs.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        theirs.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return ours, theirs


def randomize(module):
    """Weights that are far from the initial ones, where norms and predictors do almost nothing."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn_like(value)
            if "running_var" in name:
                value.copy_(noise.abs() + 0.5)
            elif value.dim() > 1:
                value.add_(noise / value[0].numel() ** 0.5)
            else:
                value.add_(noise * 0.1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_box_and_mask_heads(norm, training):
    ours, theirs = both_cfgs(*norm_opts(norm))
    torch.manual_seed(0)
    shape = ShapeSpec(channels=64, width=7, height=7)
    for our_head, their_head in (
        (build_box_head(ours, 64), FastRCNNConvFCHead(theirs, shape)),
        (build_mask_head(ours, 64), MaskRCNNConvUpsampleHead(theirs, shape)),
    ):
        randomize(their_head)
        our_head.load_state_dict(their_head.state_dict())
        x = torch.randn(5, 64, 7, 7)
        outputs, grads = [], []
        for head in (our_head, their_head):
            head.train(training)
            leaf = x.clone().requires_grad_()
            # Detectron2's mask head has the losses in its forward.
            y = getattr(head, "layers", head.__call__)(leaf)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            outputs.append(y)
            grads.append([leaf.grad, *(p.grad for p in head.parameters())])
        torch.testing.assert_close(*outputs, **CLOSE)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(our_head.state_dict(), their_head.state_dict(), **CLOSE)


@pytest.mark.parametrize("num_conv, num_fc", [(0, 2), (4, 1)])
def test_initial_weights(num_conv, num_fc):
    """Of the same distribution."""
    ours, theirs = both_cfgs(
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", str(num_conv), "MODEL.ROI_BOX_HEAD.NUM_FC", str(num_fc)),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", str(num_conv)),
    )
    shape = ShapeSpec(channels=64, width=7, height=7)
    for our_build, their_build in (
        (build_box_head, FastRCNNConvFCHead),
        (build_mask_head, MaskRCNNConvUpsampleHead),
    ):
        found = our_build(ours, 64).state_dict()
        expected = their_build(theirs, shape).state_dict()
        assert list(found) == list(expected)
        for name, value in found.items():
            assert value.shape == expected[name].shape
            if value.dim() > 1:
                assert value.std().item() == pytest.approx(expected[name].std().item(), rel=0.05)
            else:
                assert torch.equal(value, expected[name])


@pytest.mark.parametrize("pooler_type, aligned", [("ROIAlignV2", True), ("ROIAlign", False)])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooler(pooler_type, aligned, sampling_ratio):
    features = [torch.randn(2, 3, 512 // s, 512 // s) for s in STRIDES]
    start = torch.rand(400, 2) * 200
    boxes = torch.cat([start, start + torch.rand(400, 2) * 500], 1)
    whole = torch.tensor([[0.0, 0, s, s] for s in (56, 112, 224, 448, 500)])  # where levels change
    boxes = [torch.cat([boxes[:250], whole]), boxes[250:]]
    theirs = ROIPooler(7, [1 / s for s in STRIDES], sampling_ratio, pooler_type)
    expected = theirs(features, [Boxes(b) for b in boxes])
    found = RoIPooler(7, STRIDES, sampling_ratio, aligned)(features, boxes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def some_masks(num):
    """Discs, and boxes that see some part of them."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    cx, cy, r = (torch.rand(num, 3) * torch.tensor([128.0, 128, 50])).T[..., None, None]
    masks = ((x - cx) ** 2 + (y - cy) ** 2) < r**2
    start = torch.rand(num, 2) * 90
    return masks, torch.cat([start, (start + torch.rand(num, 2) * 80).clamp(max=128)], 1)


def test_cropped_masks():
    masks, boxes = some_masks(50)
    expected = BitMasks(masks).crop_and_resize(boxes, 28)
    assert torch.equal(crop_masks(masks.to(torch.uint8), boxes, 28), expected.float())
    assert 0.05 < expected.float().mean() < 0.95


def test_pasted_masks():
    masks = torch.rand(50, 28, 28)
    _, boxes = some_masks(50)
    expected = paste_masks_in_image(masks, Boxes(boxes), (128, 128), threshold=0.5)
    found = torch.stack([paste_mask(m, b, (128, 128)) for m, b in zip(masks, boxes, strict=True)])
    differ = (found >= 0.5) != expected
    # Only where the probability is one half, up to rounding.
    assert differ.sum() < 20 and ((found[differ] - 0.5).abs() < 1e-4).all()
    assert expected.sum() > 1000


def detectron2_key(key):
    """The name in Detectron2 of a weight of the torchvision host."""
    for pattern, replacement in (
        (r"backbone\.body\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1."),
        (r"backbone\.body\.layer(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}"),
        (r"backbone\.body\.", "backbone.bottom_up."),  # of a normalizer-free net
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        (r"fpn\.inner_blocks\.(\d)\.", lambda m: f"fpn_lateral{int(m[1]) + 2}."),
        (r"fpn\.layer_blocks\.(\d)\.", lambda m: f"fpn_output{int(m[1]) + 2}."),
        (r"(fpn_\w+\d)\.0\.", r"\1."),
        (r"(fpn_\w+\d)\.1\.", r"\1.norm."),
        (r"^rpn\.head", "proposal_generator.rpn_head"),
    ):
        key = re.sub(pattern, replacement, key)
    return key


def both_models(*opts, stock=True):
    """With the same weights."""
    ours, theirs = both_cfgs(*opts, stock=stock)
    our_model, their_model = build_model(ours), detectron2.modeling.build_model(theirs)
    for module in (our_model.rpn.head, our_model.roi_heads):
        randomize(module)
    their_model.load_state_dict({detectron2_key(k): v for k, v in our_model.state_dict().items()})
    return our_model, their_model


def batch():
    images = [torch.rand(3, 96, 128) * 255, torch.rand(3, 64, 160) * 255]
    targets, inputs = [], []
    for image, num in zip(images, (3, 2), strict=True):
        size = tuple(image.shape[1:])
        boxes = torch.tensor([[5.0, 8, 40, 45], [30, 20, 110, 60], [60, 5, 75, 20]])[:num]
        labels = torch.tensor([0, 3, 1])[:num]
        masks = torch.zeros(num, *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1 : (y1 + y2) // 2 + 3, x1:x2] = True
        targets.append({"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)})
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=labels)
        instances.gt_masks = BitMasks(masks)
        inputs.append({"image": image, "height": size[0], "width": size[1], "instances": instances})
    return images, targets, inputs


EVERYTHING = [
    # Nothing is left to chance where everything is sampled.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "8192", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1024"),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5"),
]


@pytest.mark.parametrize("norm", NORMS)
def test_features(norm):
    # Stock Detectron2 has no ResNet without a norm.
    resnet = ["MODEL.RESNETS.NORM", norm or "FrozenBN"]
    our_model, their_model = both_models(*norm_opts(norm), *resnet)
    x = torch.randn(2, 3, 96, 160)
    found, expected = our_model.backbone(x), their_model.backbone(x)
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("beta", ["0.0", "0.5"])
def test_losses(norm, beta):
    """Of the whole model, and their gradients."""
    betas = ["MODEL.RPN.SMOOTH_L1_BETA", beta, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", beta]
    losses_agree(*both_models(*norm_opts(norm), *EVERYTHING, *betas))


NF = [
    *("MODEL.BACKBONE.NAME", "build_nf_resnet_fpn_backbone"),
    *("MODEL.NF.NAME", "test_nfnet", "MODEL.BACKBONE.FREEZE_AT", "2"),
]


@pytest.mark.parametrize(
    "norm, kind, opts",
    [
        ("GN", "WS", ["MODEL.RESNETS.WEIGHT_NORM", "WS"]),
        ("GN", "WN", ["MODEL.RESNETS.WEIGHT_NORM", "WN"]),
        ("", "ScaledWS", ["MODEL.RESNETS.NORM", "FrozenBN"]),
        ("", "ScaledWS", NF),
    ],
)
def test_losses_with_normalized_weights(norm, kind, opts):
    """Of all parts' weights, also with a normalizer-free backbone."""
    for part in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        opts = [*opts, f"MODEL.{part}.WEIGHT_NORM", kind]
    our_model, their_model = both_models(*norm_opts(norm), *EVERYTHING, *opts, stock=False)
    losses_agree(our_model, their_model)
    assert any("parametrizations" in name for name, _ in our_model.named_parameters())


def losses_agree(our_model, their_model):
    images, targets, inputs = batch()
    found = our_model(images, targets)
    with EventStorage():
        expected = their_model(inputs)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-5, msg=name)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    theirs = dict(their_model.named_parameters())
    for name, p in our_model.named_parameters():
        expected_grad = theirs[detectron2_key(name)].grad
        if not p.requires_grad or not expected_grad.any():
            assert p.grad is None or not p.grad.any(), name
            continue
        error = (p.grad - expected_grad).norm() / expected_grad.norm()
        assert error < 0.01, (name, error)


def test_detections():
    our_model, their_model = both_models(
        *norm_opts("GN"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.1"
    )
    images, _, inputs = batch()
    our_model.eval()
    their_model.eval()
    with torch.no_grad():
        found = our_model(images)
        expected = their_model.inference(inputs, do_postprocess=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs) > 5
        assert torch.equal(ours["labels"], theirs.pred_classes)
        torch.testing.assert_close(ours["boxes"], theirs.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(ours["scores"], theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours["masks"], theirs.pred_masks, rtol=1e-3, atol=1e-3)


def test_evaluation_of_masks(tiny_shapes, tmp_path):
    """Detectron2's evaluator and ours, on the same detections."""
    from detectron2.data import build_detection_test_loader
    from detectron2.evaluation import COCOEvaluator

    ours, theirs = both_cfgs(*tiny_shapes)
    bn_det.d2.register_datasets(theirs)
    dataset = load_coco("tiny_val", registered_sources(ours)["tiny_val"], True, True)
    DatasetCatalog.get("tiny_val")
    evaluator = COCOEvaluator("tiny_val", output_dir=str(tmp_path))
    evaluator.reset()
    rng, predictions = np.random.default_rng(0), []
    for inputs in build_detection_test_loader(theirs, "tiny_val"):
        annotations = dataset.coco.imgToAnns[inputs[0]["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in annotations])
        masks = [np.roll(dataset.coco.annToMask(a), rng.integers(-4, 5), 1) for a in annotations]
        instances = Instances((128, 128), scores=torch.rand(len(boxes)))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        classes = [dataset.category_ids.index(a["category_id"]) for a in annotations]
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = torch.from_numpy(np.stack(masks)).bool()
        evaluator.process(inputs, [{"instances": instances}])
        predictions += [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": a["bbox"],
                "score": score,
                "segmentation": encode_mask(mask),
            }
            for a, mask, score in zip(annotations, masks, instances.scores.tolist(), strict=True)
        ]
    expected = evaluator.evaluate()
    for task in ("bbox", "segm"):
        found = coco_metrics(dataset, predictions, task)
        assert list(found) == list(expected[task])
        assert list(found.values()) == pytest.approx(
            list(expected[task].values()), abs=1e-3, nan_ok=True
        )
    assert found["AP"] < 99


def test_number_of_classes():
    for cfg in both_cfgs("MODEL.ROI_HEADS.NUM_CLASSES", "3"):
        check_num_classes(cfg, "DATASETS.TRAIN", "mine", 3)
        with pytest.raises(InputError, match=r"ROI_HEADS.NUM_CLASSES: 3 .* mine of DATASETS.TRAIN"):
            check_num_classes(cfg, "DATASETS.TRAIN", "mine", 4)
        cfg.MODEL.META_ARCHITECTURE = "SomebodysOwn"
        check_num_classes(cfg, "DATASETS.TRAIN", "mine", 4)


@pytest.mark.parametrize(
    "config",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
    ],
)
def test_stock_configs(config):
    """Detectron2's configs for COCO, with the names of our heads, mean something here."""
    cfg = get_cfg()
    opts = [
        *("MODEL.ROI_BOX_HEAD.NAME", "BNFastRCNNConvFCHead"),
        *("MODEL.ROI_MASK_HEAD.NAME", "BNMaskRCNNConvUpsampleHead"),
        *("MODEL.RESNETS.STRIDE_IN_1X1", "False"),
    ]
    load_config(cfg, detectron2.model_zoo.get_config_file(config), opts, "torchvision")
    check_cfg(cfg)


def test_an_annotation_without_a_segmentation(tiny_shapes, tmp_path):
    """Also on this host it is found before the training."""
    _, theirs = both_cfgs(*tiny_shapes)
    _, source, images = theirs.DATASETS.REGISTER_COCO[1]
    content = json.loads(Path(source).read_text())
    del content["annotations"][2]["segmentation"]
    (tmp_path / "changed.json").write_text(json.dumps(content))
    sets = repr([["changed", str(tmp_path / "changed.json"), images]])
    opts = [*RCNN, "DATASETS.REGISTER_COCO", sets, "DATASETS.TEST", "('changed',)"]
    opts += ["DATASETS.TRAIN", "()", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    flags = {"resume": False, "eval_only": False, "num_gpus": 1, "num_machines": 1}
    args = argparse.Namespace(config_file=BASE, opts=opts, **flags)
    with pytest.raises(InputError, match="changed: .* annotation 3: it has no segmentation"):
        setup(args)
