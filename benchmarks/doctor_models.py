"""The models that benchmarks/doctor.py examines: small ones, trained on drawn shapes.

Detectors of torchvision and Detectron2 from scratch, with BatchNorm of their own kinds, and two
classifiers of timm. None has a fault of BatchNorm: levels have statistics of their own or none, and
a cosine ends every training at a learning rate of 0, so that the EMA fits the weights.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from bn_det.data.shapes import CATEGORIES, SHAPES, Variant, draw_image
from bn_det.files import write_aside
from bn_det.population.passes import surroundings

SIZE, SMALL_SIZE = 96, 48
"""Height and width of images for detectors, and for classifiers, in pixels."""

BATCH = 8
EARLIER = (0.75, 0.5, 0.25)
"""The parts of a training after which a checkpoint is kept, beside that of the end."""

_SCENES = SHAPES._replace(num_objects=(1, 4), object_sizes=(32.0, 112.0))
_SINGLE = SHAPES._replace(
    num_objects=(1, 1), object_sizes=(48.0, 112.0), hue_spread=0.15, noise=(4.0, 12.0)
)
_NUM_TRAIN, _NUM_TEST = 1000, 100
_TIMES_TEST = 4
"""As many images for a classifier, whose images are small."""

logger = logging.getLogger("doctor")


class Sample(NamedTuple):
    """Attributes:
    image: shape (3, H, W), RGB, uint8.
    boxes: shape (N, 4), corners in pixels.
    classes: shape (N,), from 0.
    masks: shape (N, H, W), bool.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    masks: Tensor


@cache
def samples(for_detectors: bool, appearance: str, seed: int, number: int) -> list[Sample]:
    """Drawn scenes, or images of one object."""
    variant, size = (_SCENES, SIZE) if for_detectors else (_SINGLE, SMALL_SIZE)
    variant = variant._replace(appearance=appearance)
    return [_sample(variant, seed, index, size) for index in range(number)]


def _sample(variant: Variant, seed: int, index: int, size: int) -> Sample:
    pixels, objects = draw_image(seed, index, variant)
    scale = size / len(pixels)
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)[:, :, ::-1]
    boxes = torch.tensor([of["bbox"] for of in objects]).reshape(-1, 4) * scale
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(objects), size, size), np.uint8)
    for mask, of in zip(masks, objects, strict=True):
        polygon = np.reshape(of["segmentation"][0], (-1, 2)) * scale
        cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1)
    return Sample(
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        boxes.clamp(0, size),
        torch.tensor([of["category_id"] - 1 for of in objects]),
        torch.from_numpy(masks).bool(),
    )


class Kind(NamedTuple):
    """Of model.

    Attributes:
        make: a new one.
        call: the loss, or losses by name, of a model and a batch of samples.
        score: in percent, of a model in evaluation mode and samples: AP of boxes, or accuracy.
        is_detector: which samples it takes.
        iterations, rate: of its training.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Sequence[Sample]], Any]
    score: Callable[[nn.Module, Sequence[Sample]], float]
    is_detector: bool
    iterations: int
    rate: float

    @property
    def test(self) -> list[Sample]:
        number = _NUM_TEST if self.is_detector else _TIMES_TEST * _NUM_TEST
        return samples(self.is_detector, "", 11, number)

    def batches(self, seed: int, appearance: str = "") -> Iterator[list[Sample]]:
        """Of training images, without end, in an order by the seed."""
        # Of another appearance a part is enough: drawing takes longer than passes.
        number = _NUM_TRAIN // 4 if appearance else _NUM_TRAIN
        drawn = samples(self.is_detector, appearance, 10, number)
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(drawn), generator=generator).tolist()
            for k in range(0, len(order) - BATCH + 1, BATCH):
                yield [_flipped(drawn[i], generator) for i in order[k : k + BATCH]]


def _flipped(of: Sample, generator: torch.Generator) -> Sample:
    """Mirrored, or not."""
    if torch.rand(1, generator=generator) < 0.5:
        return of
    size = of.image.shape[-1]
    boxes = torch.stack([size - of.boxes[:, 2], *of.boxes[:, 1:2].T, size - of.boxes[:, 0],
                         of.boxes[:, 3]], 1)  # fmt: skip
    return Sample(of.image.flip(-1), boxes, of.classes, of.masks.flip(-1))


# --- timm


def _timm_resnet(**kwargs: Any) -> nn.Module:
    """A ResNet-10 of a quarter of the usual width."""
    import timm

    of_model = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
    return timm.create_model("resnet18", stem_type="deep", stem_width=8, **of_model, **kwargs)


def _timm_resnet_classifier() -> nn.Module:
    return _timm_resnet(num_classes=len(CATEGORIES))


def _timm_mobilenet() -> nn.Module:
    import timm

    return timm.create_model("mobilenetv3_small_050", num_classes=len(CATEGORIES))


def _images(batch: Sequence[Sample]) -> Tensor:
    return (torch.stack([of.image for of in batch]) - 127.5) / 64


def _classify(model: nn.Module, batch: Sequence[Sample]) -> Tensor:
    classes = torch.stack([of.classes[0] for of in batch])
    return nn.functional.cross_entropy(model(_images(batch)), classes)


def _accuracy(model: nn.Module, test: Sequence[Sample]) -> float:
    with torch.no_grad():
        right = [
            model(_images(part)).argmax(1) == torch.stack([of.classes[0] for of in part])
            for part in _parts(test, 50)
        ]
    return 100 * float(torch.cat(right).float().mean())


def _parts(test: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (test[k : k + size] for k in range(0, len(test), size))


# --- torchvision


def _tv_backbone() -> nn.Module:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(
        _timm_resnet(num_classes=0), layers, [32, 64, 128], 32, norm_layer=nn.BatchNorm2d
    )


_TV: dict[str, Any] = {
    "min_size": SIZE,
    "max_size": SIZE,
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
}
_SIZES = (18, 26), (36, 52), (72, 90), (112,)
"""Of anchors, by level; torchvision's pyramid has one more, which is pooled."""


def _tv_anchors(sizes: Sequence[tuple[int, ...]]) -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(tuple(sizes), ((1.0,),) * len(sizes))


def _tv_retinanet() -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.retinanet import RetinaNetHead

    anchors = _tv_anchors([*_SIZES[:3], (96, 112)])
    head = RetinaNetHead(32, 2, len(CATEGORIES) + 1)
    return RetinaNet(
        _tv_backbone(), len(CATEGORIES) + 1, anchor_generator=anchors, head=head, **_TV
    )


def _tv_fcos() -> nn.Module:
    from torchvision.models.detection import FCOS

    anchors = _tv_anchors([(8,), (16,), (32,), (64,)])
    return FCOS(_tv_backbone(), len(CATEGORIES) + 1, anchor_generator=anchors, **_TV)


def _tv_mask_rcnn() -> nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

    anchors = _tv_anchors([(22,), (44,), (80,), (112,)])
    return MaskRCNN(
        _tv_backbone(),
        rpn_anchor_generator=anchors,
        box_head=FastRCNNConvFCHead((32, 7, 7), [32], [64], norm_layer=nn.BatchNorm2d),
        box_predictor=_tv_predictor(),
        mask_head=MaskRCNNHeads(32, [32], 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=_tv_mask_predictor(),
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=30,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=32,
        **_TV,
    )


def _tv_predictor() -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return FastRCNNPredictor(64, len(CATEGORIES) + 1)


def _tv_mask_predictor() -> nn.Module:
    from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

    return MaskRCNNPredictor(32, 16, len(CATEGORIES) + 1)


def _tv_losses(model: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
    targets = [
        {"boxes": of.boxes, "labels": of.classes + 1, "masks": of.masks.byte()} for of in batch
    ]
    return model([of.image / 255 for of in batch], targets)


def _tv_detect(model: nn.Module, batch: Sequence[Sample]) -> Iterator[tuple[Tensor, ...]]:
    for of in model([of.image / 255 for of in batch]):
        yield of["boxes"], of["scores"], of["labels"] - 1


# --- Detectron2


def _d2_backbone() -> nn.Module:
    from detectron2.modeling.backbone import FPN, BasicStem, ResNet
    from detectron2.modeling.backbone.resnet import BasicBlock

    widths = 16, 16, 32, 64, 128
    stages = [
        ResNet.make_stage(
            BasicBlock, 1, stride_per_block=[1 if k == 0 else 2], in_channels=widths[k],
            out_channels=widths[k + 1], norm="BN",
        )
        for k in range(4)
    ]  # fmt: skip
    levels = ["res3", "res4", "res5"]
    return FPN(ResNet(BasicStem(3, 16, "BN"), stages, out_features=levels), levels, 32, "BN")


_LEVELS = ["p3", "p4", "p5"]
_STRIDES = [8, 16, 32]
_PIXELS = {"pixel_mean": [127.5] * 3, "pixel_std": [64.0] * 3}


def _d2_anchors(sizes: Sequence[Sequence[int]]) -> nn.Module:
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    return DefaultAnchorGenerator(
        sizes=[list(of) for of in sizes], aspect_ratios=[1.0], strides=_STRIDES, offset=0.5
    )


def _d2_head(kind: type[nn.Module], **kwargs: Any) -> nn.Module:
    from detectron2.layers import ShapeSpec

    shapes = [ShapeSpec(channels=32, stride=stride) for stride in _STRIDES]
    # By that name each level has statistics of its own.
    return kind(
        input_shape=shapes, num_classes=len(CATEGORIES), conv_dims=[32, 32], norm="BN", **kwargs
    )


def _d2_retinanet() -> nn.Module:
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

    return RetinaNet(
        backbone=_d2_backbone(),
        head=_d2_head(RetinaNetHead, num_anchors=2),
        head_in_features=_LEVELS,
        anchor_generator=_d2_anchors(_SIZES[:3]),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=len(CATEGORIES),
        **_PIXELS,
    )


def _d2_fcos() -> nn.Module:
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    return FCOS(
        backbone=_d2_backbone(),
        head=_d2_head(FCOSHead),
        head_in_features=_LEVELS,
        num_classes=len(CATEGORIES),
        **_PIXELS,
    )


def _d2_mask_rcnn() -> nn.Module:
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import (
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
        MaskRCNNConvUpsampleHead,
        StandardROIHeads,
    )

    def pooler(size: int) -> nn.Module:
        return ROIPooler(size, [1 / s for s in _STRIDES], 2, "ROIAlignV2", canonical_box_size=60)

    def pooled(size: int) -> ShapeSpec:
        return ShapeSpec(channels=32, height=size, width=size)

    classes = len(CATEGORIES)
    rpn = RPN(
        in_features=_LEVELS,
        head=StandardRPNHead(in_channels=32, num_anchors=1),
        anchor_generator=_d2_anchors([(22,), (44,), (80,)]),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=64,
        positive_fraction=0.5,
        pre_nms_topk=(100, 100),
        post_nms_topk=(50, 30),
    )
    heads = StandardROIHeads(
        num_classes=classes,
        batch_size_per_image=32,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=_LEVELS,
        box_pooler=pooler(7),
        box_head=FastRCNNConvFCHead(pooled(7), conv_dims=[32], fc_dims=[64], conv_norm="BN"),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=64),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes=classes,
            test_score_thresh=0.05,
        ),
        mask_in_features=_LEVELS,
        mask_pooler=pooler(14),
        mask_head=MaskRCNNConvUpsampleHead(
            pooled(14), num_classes=classes, conv_dims=[32, 16], conv_norm="BN"
        ),
    )
    return GeneralizedRCNN(
        backbone=_d2_backbone(), proposal_generator=rpn, roi_heads=heads, **_PIXELS
    )


def _d2_losses(model: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
    from detectron2.structures import BitMasks, Boxes, Instances

    inputs = []
    for of in batch:
        instances = Instances(of.image.shape[-2:])
        instances.gt_boxes, instances.gt_classes = Boxes(of.boxes), of.classes
        instances.gt_masks = BitMasks(of.masks)
        inputs.append({"image": of.image, "instances": instances})
    return model(inputs)


def _d2_detect(model: nn.Module, batch: Sequence[Sample]) -> Iterator[tuple[Tensor, ...]]:
    for outputs in model([{"image": of.image} for of in batch]):
        of = outputs["instances"]
        yield of.pred_boxes.tensor, of.scores, of.pred_classes


# --- AP


Detect = Callable[[nn.Module, Sequence[Sample]], Iterator[tuple[Tensor, ...]]]


def _ap_by(detect: Detect) -> Callable[[nn.Module, Sequence[Sample]], float]:
    return lambda model, test: ap(model, test, detect)


def ap(model: nn.Module, test: Sequence[Sample], detect: Detect) -> float:
    """COCO's AP of boxes in percent; 0 where nothing is detected."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for index, (boxes, scores, classes) in enumerate(_detected(model, test, detect)):
            for box, score, k in zip(boxes, scores.tolist(), classes.tolist(), strict=True):
                if math.isfinite(score) and box.isfinite().all():
                    found.append(_record(index, box, k) | {"score": score})
    if not found:
        return 0.0
    with redirect_stdout(StringIO()):
        truth = COCO()
        objects = [
            _record(index, box, k) | {"iscrowd": 0}
            for index, of in enumerate(test)
            for box, k in zip(of.boxes, of.classes.tolist(), strict=True)
        ]
        truth.dataset = {
            "images": [{"id": k, "height": SIZE, "width": SIZE} for k in range(len(test))],
            "categories": [{"id": k} for k in range(len(CATEGORIES))],
            "annotations": [of | {"id": k + 1} for k, of in enumerate(objects)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * max(float(evaluation.stats[0]), 0.0)


def _detected(
    model: nn.Module, test: Sequence[Sample], detect: Detect
) -> Iterator[tuple[Tensor, ...]]:
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    for part in _parts(test, 10):
        try:
            yield from list(detect(model, part))
        except (AssertionError, FloatingPointError):  # how Detectron2 refuses boxes that are NaN
            yield from [nothing] * len(part)


def _record(image: int, box: Tensor, k: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box.tolist()
    area = (x1 - x0) * (y1 - y0)
    return {"image_id": image, "category_id": k, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area}


# --- all


KINDS = {
    # Its head has no norm, and learns nothing (AP 0.6) by the rate of the others.
    "tv_retinanet": Kind(_tv_retinanet, _tv_losses, _ap_by(_tv_detect), True, 2000, 0.05),
    "tv_fcos": Kind(_tv_fcos, _tv_losses, _ap_by(_tv_detect), True, 700, 0.01),
    "tv_mask_rcnn": Kind(_tv_mask_rcnn, _tv_losses, _ap_by(_tv_detect), True, 700, 0.02),
    "d2_retinanet": Kind(_d2_retinanet, _d2_losses, _ap_by(_d2_detect), True, 700, 0.02),
    "d2_fcos": Kind(_d2_fcos, _d2_losses, _ap_by(_d2_detect), True, 700, 0.02),
    "d2_mask_rcnn": Kind(_d2_mask_rcnn, _d2_losses, _ap_by(_d2_detect), True, 700, 0.02),
    "timm_resnet": Kind(_timm_resnet_classifier, _classify, _accuracy, False, 1000, 0.05),
    "timm_mobilenet": Kind(_timm_mobilenet, _classify, _accuracy, False, 1000, 0.02),
}

State = dict[str, Tensor]


class Healthy(NamedTuple):
    """A trained model.

    Attributes:
        kind: of model.
        state: its weights and statistics.
        earlier: those of the same training at EARLIER.
    """

    kind: Kind
    state: State
    earlier: list[State]

    def make(self) -> nn.Module:
        """A new model without these weights, as a user's code makes one."""
        torch.manual_seed(0)
        return self.kind.make()

    def score(self, model: nn.Module) -> float:
        return self.kind.score(model, self.kind.test)


def healthy(name: str, folder: Path, iterations: int | None) -> Healthy:
    """A model by name, trained if the folder has no checkpoint of it.

    Args:
        iterations: None for as many as its kind has.
    """
    kind = KINDS[name]
    if iterations is not None:
        kind = kind._replace(iterations=iterations)
    path = folder / f"{name}-{kind.iterations}.pth"
    if name.startswith("d2"):
        import bn_det.d2  # noqa: F401  what passes over its models run in
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        states = _trained(name, kind)
        with write_aside(path) as aside:
            torch.save(states, aside)
    *earlier, state = torch.load(path, weights_only=True)
    return Healthy(kind, state, earlier[::-1])


def _trained(name: str, kind: Kind) -> list[State]:
    """The states of a training, the last at its end."""
    torch.manual_seed(1)
    model = kind.make().train()
    steps = kind.iterations
    optimizer = torch.optim.SGD(model.parameters(), kind.rate, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.rate, steps, pct_start=0.2)
    kept = {max(1, round(part * steps)) for part in (*EARLIER, 1.0)}
    states = []
    for step, batch in zip(range(1, steps + 1), kind.batches(1), strict=False):
        with surroundings():
            losses = kind.call(model, batch)
            loss = sum(losses.values()) if isinstance(losses, dict) else losses
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step in kept:
            states.append(copy.deepcopy(dict(model.state_dict())))
        if step % 100 == 0:
            logger.info("%s: trained %d of %d steps, loss %.3f", name, step, steps, float(loss))
    return states
