"""Faster and Mask R-CNN for torchvision, with Detectron2's heads, losses and names.

Modules of the heads have Detectron2's state-dict keys. Classes are counted from 0 in targets and
detections; within the RoI heads the background is the last class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from ..config.parts import part_norm, shuffle_of
from ..layers import forward_levels, normalize_tower
from ..layers.norms import NormFactory
from ..layers.shuffle import shuffled
from .config import POOLER_TYPES
from .masks import crop_masks
from .norms import NORMS
from .pooler import RoIPooler

Target = dict[str, Tensor]
"""``boxes`` (N, 4) as x1, y1, x2, y2, ``labels`` (N,), and ``masks`` (N, H, W) for a mask head."""


class Backbone(Protocol):
    """A module from images to the features of levels, all of which have as many channels."""

    out_channels: int

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]: ...


def build_rcnn(
    cfg: CfgNode, backbone: Backbone, anchors: AnchorGenerator, transform: nn.Module
) -> GeneralizedRCNN:
    """torchvision's R-CNN with our RPN and RoI heads.

    Args:
        backbone: from images to features of p2 to p6, with ``out_channels``.
        transform: from images and targets to an ``ImageList`` and targets.
    """
    channels = backbone.out_channels
    rpn_head = RPNHead(
        channels,
        anchors.num_anchors_per_location()[0],
        cfg.MODEL.RPN.CONV_DIMS,
        part_norm(cfg, "RPN", NORMS, len(cfg.MODEL.RPN.IN_FEATURES)),
        cfg.MODEL.RPN.WEIGHT_NORM,
    )
    rpn = RPN(cfg, anchors, rpn_head)
    return GeneralizedRCNN(backbone, rpn, StandardRoIHeads(cfg, channels), transform)


class RPNHead(nn.Module):
    """3x3 convolutions, each with norm and ReLU, then objectness and box deltas, for all levels.

    Args:
        channels: of every level.
        num_anchors: anchors at each position.
        conv_dims: output channels of each convolution, -1 for as many as its input has.
        norm: from the number of channels to a layer for one level, or to a
            :class:`~bn_det.DomainBatchNorm2d` for all; None for no normalization.
        weight_norm: of the convolutions' weights, by name (:func:`bn_det.normalize_weight`).
    """

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        conv_dims: Sequence[int] = (-1,),
        norm: NormFactory | None = None,
        weight_norm: str = "",
    ) -> None:
        super().__init__()
        convs = nn.Sequential()
        for k, dim in enumerate(conv_dims):
            out_channels = channels if dim == -1 else dim
            convs.add_module(f"conv{k}", _ConvNormReLU(channels, out_channels, norm, bias=True))
            channels = out_channels
        self.conv = convs[0] if len(convs) == 1 else convs  # which gives Detectron2's keys
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                _init_normal(layer, 0.01)
        _normalize_weights(convs, weight_norm)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """From (N, C, H, W) for each level to (N, A, H, W) and (N, 4 * A, H, W)."""
        hidden = forward_levels([self.conv], features)
        logits = forward_levels([self.objectness_logits], hidden)
        return logits, forward_levels([self.anchor_deltas], hidden)


class RPN(RegionProposalNetwork):
    """torchvision's RPN with Detectron2's losses, which are finite without a sampled anchor."""

    min_size: float

    def __init__(self, cfg: CfgNode, anchors: AnchorGenerator, head: nn.Module) -> None:
        rpn = cfg.MODEL.RPN
        background, foreground = rpn.IOU_THRESHOLDS
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=foreground,
            bg_iou_thresh=background,
            batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
            pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
            nms_thresh=rpn.NMS_THRESH,
        )
        self.min_size = max(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE, self.min_size)
        self.smooth_l1_beta = rpn.SMOOTH_L1_BETA

    def forward(self, *args, **kwargs) -> tuple[list[Tensor], dict[str, Tensor]]:
        boxes, losses = super().forward(*args, **kwargs)
        names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc"}
        return boxes, {names[name]: loss for name, loss in losses.items()}

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(m).bool() for m in self.fg_bg_sampler(labels))
        sampled = positive | negative
        num_samples = self.fg_bg_sampler.batch_size_per_image * len(labels)
        loss_cls = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        loss_loc = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=self.smooth_l1_beta,
            reduction="sum",
        )
        return loss_cls / num_samples, loss_loc / num_samples


class StandardRoIHeads(RoIHeads):
    """A box head, and a mask head with MODEL.MASK_ON, on RoIs of p2 to p5.

    Sampling and the choice of detections are torchvision's; the losses are Detectron2's. Every
    head runs on every batch, on no RoIs if need be: all parameters get a gradient, as
    DistributedDataParallel expects, and layers that synchronize meet on every process.
    """

    def __init__(self, cfg: CfgNode, channels: int) -> None:
        roi_heads, num_classes = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        box_head = build_box_head(cfg, channels)
        super().__init__(
            _pooler(cfg, "ROI_BOX_HEAD"),
            box_head,
            BoxPredictor(box_head.out_features, num_classes),
            fg_iou_thresh=roi_heads.IOU_THRESHOLDS[0],
            bg_iou_thresh=roi_heads.IOU_THRESHOLDS[0],
            batch_size_per_image=roi_heads.BATCH_SIZE_PER_IMAGE,
            positive_fraction=roi_heads.POSITIVE_FRACTION,
            bbox_reg_weights=None,
            score_thresh=roi_heads.SCORE_THRESH_TEST,
            nms_thresh=roi_heads.NMS_THRESH_TEST,
            detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        if cfg.MODEL.MASK_ON:
            self.mask_roi_pool = _pooler(cfg, "ROI_MASK_HEAD")
            self.mask_head = build_mask_head(cfg, channels)
        self.in_features = list(roi_heads.IN_FEATURES)
        self.num_classes = num_classes
        self.smooth_l1_beta = cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA

    def has_mask(self) -> bool:
        return self.mask_head is not None

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, or losses in training.

        Args:
            features: (N, C, H, W) by level; of more levels than those of the RoIs.
            proposals: for each image (R, 4); x1, y1, x2, y2 in pixels.
            image_shapes: for each image height and width, before padding.
            targets: for each image, in training.

        Returns:
            For each image ``boxes`` (D, 4), ``labels`` (D,), ``scores`` (D,), and with a mask head
            ``masks``, probabilities (D, 1, M, M) of the boxes' parts; none in training. And the
            losses by name; none in evaluation.
        """
        levels = [features[f] for f in self.in_features]
        if self.training:
            assert targets is not None  # GeneralizedRCNN refuses that
            return [], self.losses(levels, *self.sample_rois(proposals, targets))
        return self._detect(levels, proposals, image_shapes), {}

    def sample_rois(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Target]]:
        """Sample RoIs to train on, from proposals and true boxes.

        Returns:
            For each image the RoIs (R, 4), and what each is to become: ``classes`` (R,), from 0,
            with num_classes for the background; ``deltas`` (R, 4), encoded; and with a mask head
            ``masks`` (P, M, M) of those that are not background. Deltas of background are
            undefined.
        """
        # In torchvision the background is class 0.
        shifted = [{**t, "labels": t["labels"] + 1} for t in targets]
        rois, matched, labels, deltas = self.select_training_samples(proposals, shifted)
        samples = []
        for n, target in enumerate(targets):
            classes = (labels[n] - 1) % (self.num_classes + 1)
            samples.append({"classes": classes, "deltas": deltas[n]})
            if self.has_mask():
                foreground = classes < self.num_classes
                masks = target["masks"][matched[n][foreground]]
                size = self.mask_head.scale * self.mask_roi_pool.output_size
                samples[n]["masks"] = crop_masks(masks, rois[n][foreground], size)
        return rois, samples

    def losses(
        self, features: Sequence[Tensor], rois: list[Tensor], samples: list[Target]
    ) -> dict[str, Tensor]:
        """The losses of sampled RoIs, as ``sample_rois`` returns them."""
        classes = torch.cat([s["classes"] for s in samples])
        (foreground,) = torch.where(classes < self.num_classes)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, rois)))
        num_rois = max(len(classes), 1)
        losses = {
            "loss_cls": F.cross_entropy(scores, classes, reduction="sum") / num_rois,
            "loss_box_reg": F.smooth_l1_loss(
                deltas.unflatten(1, (-1, 4))[foreground, classes[foreground]],
                torch.cat([s["deltas"] for s in samples])[foreground],
                beta=self.smooth_l1_beta,
                reduction="sum",
            )
            / num_rois,
        }
        if self.has_mask():
            boxes = [r[s["classes"] < self.num_classes] for r, s in zip(rois, samples, strict=True)]
            logits = self.mask_head(self.mask_roi_pool(features, boxes))
            index = torch.arange(len(foreground), device=logits.device)
            masks = torch.cat([s["masks"] for s in samples])
            loss = F.binary_cross_entropy_with_logits(
                logits[index, classes[foreground]], masks, reduction="sum"
            )
            losses["loss_mask"] = loss / max(masks.numel(), 1)
        return losses

    def _detect(
        self,
        features: Sequence[Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        # The background comes first in torchvision, and has deltas there, which are dropped.
        columns = self.postprocess_detections(
            scores.roll(1, 1), F.pad(deltas, (4, 0)), proposals, image_shapes
        )
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*columns, strict=True)
        ]
        if self.has_mask():
            boxes = [d["boxes"] for d in detections]
            logits = self.mask_head(self.mask_roi_pool(features, boxes))
            classes = torch.cat([d["labels"] for d in detections])
            # shape[0], not len, which torch.jit.trace takes for a constant
            index = torch.arange(classes.shape[0], device=logits.device)
            masks = logits[index, classes][:, None].sigmoid().split([b.shape[0] for b in boxes])
            for detection, mask in zip(detections, masks, strict=True):
                detection["masks"] = mask
        return detections


class BoxHead(nn.Sequential):
    """3x3 convolutions, each with norm and ReLU, then fully connected layers with ReLU.

    From (R, in_channels, size, size) to (R, out_features), or to (R, conv_dim, size, size) without
    fully connected layers.

    Args:
        size: side of a RoI in cells.
        norm: from the number of channels to a layer; None for no normalization.
        weight_norm: of the weights, by name (:func:`bn_det.normalize_weight`).
        dropout: its probability on the output.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        num_conv: int,
        conv_dim: int,
        num_fc: int,
        fc_dim: int,
        norm: NormFactory | None,
        weight_norm: str = "",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _add_convs(self, "conv", in_channels, num_conv, conv_dim, norm)
        self.out_features = (conv_dim if num_conv else in_channels) * size**2
        if num_fc:
            self.add_module("flatten", nn.Flatten())
        for k in range(num_fc):
            fc = nn.Linear(self.out_features, fc_dim)
            c2_xavier_fill(fc)
            self.add_module(f"fc{k + 1}", fc)
            self.add_module(f"fc_relu{k + 1}", nn.ReLU())
            self.out_features = fc_dim
        _normalize_weights(self, weight_norm)
        if dropout:
            self.add_module("dropout", nn.Dropout(dropout))


class BoxPredictor(nn.Module):
    """From features (R, ...) to class scores (R, num_classes + 1) and deltas (R, 4 * num_classes).

    Args:
        in_features: number of values of a RoI.
        num_classes: background not counted.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, num_classes * 4)
        _init_normal(self.cls_score, 0.01)
        _init_normal(self.bbox_pred, 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)


class MaskHead(nn.Sequential):
    """3x3 convolutions, each with norm and ReLU, then an upsampling and a mask for each class.

    From (R, in_channels, M, M) to logits (R, num_classes, scale * M, scale * M).

    Args:
        norm: from the number of channels to a layer; None for no normalization.
        weight_norm: of the hidden layers' weights, by name (:func:`bn_det.normalize_weight`).
    """

    scale = 2

    def __init__(
        self,
        in_channels: int,
        num_conv: int,
        conv_dim: int,
        num_classes: int,
        norm: NormFactory | None,
        weight_norm: str = "",
    ) -> None:
        super().__init__()
        _add_convs(self, "mask_fcn", in_channels, num_conv, conv_dim, norm)
        channels = conv_dim if num_conv else in_channels
        self.deconv = nn.ConvTranspose2d(channels, conv_dim, self.scale, self.scale)
        self.deconv_relu = nn.ReLU()
        c2_msra_fill(self.deconv)
        _normalize_weights(self, weight_norm)
        self.predictor = nn.Conv2d(conv_dim, num_classes, kernel_size=1)
        _init_normal(self.predictor, 0.001)


def build_box_head(cfg: CfgNode, in_channels: int) -> BoxHead:
    """The head of MODEL.ROI_BOX_HEAD, shuffled if that says so."""
    node = cfg.MODEL.ROI_BOX_HEAD
    head = BoxHead(
        in_channels,
        node.POOLER_RESOLUTION,
        node.NUM_CONV,
        node.CONV_DIM,
        node.NUM_FC,
        node.FC_DIM,
        part_norm(cfg, "ROI_BOX_HEAD", NORMS),
        node.WEIGHT_NORM,
        node.DROPOUT,
    )
    return shuffled(head) if shuffle_of(cfg, "ROI_BOX_HEAD") else head


def build_mask_head(cfg: CfgNode, in_channels: int) -> MaskHead:
    """The head of MODEL.ROI_MASK_HEAD, shuffled if that says so."""
    node = cfg.MODEL.ROI_MASK_HEAD
    head = MaskHead(
        in_channels,
        node.NUM_CONV,
        node.CONV_DIM,
        cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        part_norm(cfg, "ROI_MASK_HEAD", NORMS),
        node.WEIGHT_NORM,
    )
    return shuffled(head) if shuffle_of(cfg, "ROI_MASK_HEAD") else head


class _ConvNormReLU(nn.Conv2d):
    """A 3x3 convolution with its norm in it, which gives the keys that Detectron2 has."""

    activation = staticmethod(F.relu)

    def __init__(
        self, in_channels: int, out_channels: int, norm: NormFactory | None, bias: bool
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.norm = norm(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.activation(x if self.norm is None else self.norm(x))


def _add_convs(
    head: nn.Sequential,
    name: str,
    in_channels: int,
    num_conv: int,
    conv_dim: int,
    norm: NormFactory | None,
) -> None:
    for k in range(num_conv):
        conv = _ConvNormReLU(in_channels if k == 0 else conv_dim, conv_dim, norm, norm is None)
        c2_msra_fill(conv)
        head.add_module(f"{name}{k + 1}", conv)


def _normalize_weights(head: nn.Sequential, kind: str) -> None:
    """Of the layers that a head has so far."""
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    normalize_tower((m for m in head if isinstance(m, layers)), kind)


def _init_normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    assert layer.bias is not None  # each of those that come here has one
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def _pooler(cfg: CfgNode, part: str) -> RoIPooler:
    node = cfg.MODEL[part]
    strides = [2 ** int(f.removeprefix("p")) for f in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    return RoIPooler(
        node.POOLER_RESOLUTION, strides, node.POOLER_SAMPLING_RATIO, POOLER_TYPES[node.POOLER_TYPE]
    )
