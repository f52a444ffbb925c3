"""A training step of torchvision's detectors with each norm, on random images.

It needs torch and torchvision alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from bn_det import BatchNorm2d, convert_batchnorm, forward_levels, freeze, tune
from pyramid import joint, per_level

NUM_CLASSES = 81
Change = Callable[[nn.Module], nn.Module]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def tuned(model: nn.Module) -> nn.Module:
    if left := tune(freeze(model)).left:
        raise RuntimeError(f"tune has left {left}")
    return model


def ours(model: nn.Module) -> nn.Module:
    return convert_batchnorm(model, BatchNorm2d)


def our_sync(model: nn.Module) -> nn.Module:
    return convert_batchnorm(model, lambda channels: BatchNorm2d(channels, group="world"))


class Norm(NamedTuple):
    """What a detector normalizes with.

    Attributes:
        backbone: the class of layers that it is built with.
        change: what is made of the backbone.
        head: from a number of channels to a layer for the list of levels; None for none.
    """

    backbone: type[nn.Module] = FrozenBatchNorm2d
    change: Change = as_it_is
    head: Callable[[int], nn.Module] | None = None


NORMS = {
    "FrozenBatchNorm2d": Norm(),
    "freeze": Norm(nn.BatchNorm2d, freeze),
    "tune": Norm(nn.BatchNorm2d, tuned),
    "nn.BatchNorm2d": Norm(nn.BatchNorm2d),
    "BatchNorm2d": Norm(nn.BatchNorm2d, ours),
    "nn.SyncBatchNorm": Norm(nn.BatchNorm2d, nn.SyncBatchNorm.convert_sync_batchnorm),
    "BatchNorm2d over processes": Norm(nn.BatchNorm2d, our_sync),
    "FrozenBatchNorm2d, five BNs in the head": Norm(head=per_level),
    "FrozenBatchNorm2d, shared BN in the head": Norm(head=joint),
}
"""What detectors are measured with; in a detector without a head on levels, the first seven."""


class LevelsHead(RetinaNetHead):
    """torchvision's head, whose towers see the list of levels."""

    def __init__(self, channels: int, num_anchors: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(channels, num_anchors, NUM_CLASSES)
        for head in (self.classification_head, self.regression_head):
            convs = [m for m in head.conv.modules() if isinstance(m, nn.Conv2d)]
            layers = [layer for conv in convs for layer in (conv, norm(channels), nn.ReLU())]
            head.tower, head.conv = nn.Sequential(*layers), nn.Identity()

    def forward(self, xs: list[Tensor]) -> dict[str, Tensor]:
        heads = {"cls_logits": self.classification_head, "bbox_regression": self.regression_head}
        return {name: head(forward_levels(head.tower, xs)) for name, head in heads.items()}


def make_backbone(norm: Norm, depth: int, **kwargs: object) -> nn.Module:
    name = f"resnet{depth}"
    backbone = resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=norm.backbone, trainable_layers=5, **kwargs
    )
    for block in backbone.modules():
        if isinstance(block, Bottleneck):  # of which there are many, without statistics
            nn.init.constant_(block.bn3.weight, 0.2)
    return norm.change(backbone)


def retinanet(norm: Norm, depth: int, height: int, width: int) -> nn.Module:
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    model = RetinaNet(
        make_backbone(norm, depth, **levels), NUM_CLASSES, min_size=height, max_size=width
    )
    if norm.head is not None:
        num_anchors = model.anchor_generator.num_anchors_per_location()[0]
        model.head = LevelsHead(model.backbone.out_channels, num_anchors, norm.head)
    return model


def mask_rcnn(norm: Norm, depth: int, height: int, width: int) -> nn.Module:
    backbone = make_backbone(norm, depth)
    return MaskRCNN(backbone, NUM_CLASSES, min_size=height, max_size=width)


DETECTORS = {"RetinaNet": retinanet, "Mask R-CNN": mask_rcnn}


class Batch(NamedTuple):
    """Images, shape (3, height, width), and what is in them."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]


def make_batch(size: int, height: int, width: int, device: str, objects: int = 8) -> Batch:
    """Random images with random boxes, and masks that fill them."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(size):
        images.append(torch.rand(3, height, width, generator=generator).to(device))
        corners = torch.rand(objects, 2, generator=generator) / 2
        extents = torch.rand(objects, 2, generator=generator) / 4 + 0.1
        boxes = torch.cat([corners, corners + extents], 1) * torch.tensor([width, height] * 2)
        masks = torch.zeros(objects, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        labels = torch.randint(1, NUM_CLASSES, (objects,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({k: v.to(device) for k, v in target.items()})
    return Batch(images, targets)


class Step:
    """A training step: forward and backward pass, and SGD with a learning rate of 0."""

    def __init__(self, model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> None:
        self.model, self.batch, self.autocast = model.train(), batch, autocast
        learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, lr=0.0, momentum=0.9)

    def __call__(self) -> None:
        device = self.batch.images[0].device.type
        mixed = torch.autocast(device, self.autocast) if self.autocast else nullcontext()
        with mixed:
            losses = self.model(self.batch.images, self.batch.targets)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


def names_for(detector: str) -> Sequence[str]:
    """The norms that a detector is measured with."""
    return [name for name, n in NORMS.items() if n.head is None or detector == "RetinaNet"]
