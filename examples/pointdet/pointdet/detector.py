import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import batched_nms, cat
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss, sigmoid_focal_loss_jit, smooth_l1_loss
from torch import Tensor, nn

from .head import PointHead, RefineHead

RESOLUTION = 7


@META_ARCH_REGISTRY.register()
class PointDet(nn.Module):
    """An anchor-free detector: points of a pyramid propose boxes, RoI features refine them."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.cfg = node = cfg.MODEL.POINTDET
        self.num_classes = node.NUM_CLASSES
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
        self.backbone = build_backbone(cfg)
        shapes = [self.backbone.output_shape()[f] for f in node.IN_FEATURES]
        self.strides = [s.stride for s in shapes]
        channels = shapes[0].channels
        self.point_head = PointHead(channels, len(shapes), node.NUM_CLASSES, node.NUM_CONVS)
        self.pooler = ROIPooler(
            output_size=RESOLUTION,
            scales=[1 / s for s in self.strides],
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
            canonical_box_size=node.CANONICAL_BOX_SIZE,
        )
        self.refine_head = RefineHead(channels, RESOLUTION, node.NUM_CLASSES)
        self.box_transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        self.register_buffer("pixel_mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """From Detectron2's standard inputs to losses in training, and else to detections."""
        images = [(x["image"].to(self.device) - self.pixel_mean) for x in batched_inputs]
        images = ImageList.from_tensors(
            [x / self.pixel_std for x in images], self.backbone.size_divisibility
        )
        pyramid = self.backbone(images.tensor)
        features = [pyramid[f] for f in self.cfg.IN_FEATURES]
        logits, distances = self.point_head(features)
        points, strides = self.points_of(features)
        logits, distances = flatten_levels(logits), flatten_levels(distances)
        offsets = distances * strides[:, None]
        boxes = torch.cat([points - offsets[..., :2], points + offsets[..., 2:]], dim=2)
        proposals = self.propose(logits.detach(), boxes.detach(), images.image_sizes)
        if not self.training:
            return self.postprocess(self.refine(features, proposals), batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        return {
            **self.point_losses(logits, boxes, points, strides, targets),
            **self.refine_losses(features, proposals, targets),
        }

    def points_of(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The points (P, 2) of all levels in pixels, and the stride of each (P,)."""
        points, strides = [], []
        for x, stride in zip(features, self.strides, strict=True):
            height, width = x.shape[-2:]
            ys = (torch.arange(height, device=self.device) + 0.5) * stride
            xs = (torch.arange(width, device=self.device) + 0.5) * stride
            grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
            points.append(grid.view(-1, 2))
            strides.append(points[-1].new_full((height * width,), stride))
        return torch.cat(points), torch.cat(strides)

    @torch.no_grad()
    def assign(self, points: Tensor, strides: Tensor, target: Instances) -> tuple[Tensor, Tensor]:
        """The class (num_classes for none) and the box of each point in one image."""
        labels = points.new_full((len(points),), self.num_classes, dtype=torch.long)
        if len(target) == 0:
            return labels, points.new_zeros(len(points), 4)
        boxes = target.gt_boxes.tensor
        sides = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], dim=2)
        to_center = (points[:, None] - target.gt_boxes.get_centers()).abs().amax(2)
        farthest = sides.amax(2)
        upper = strides.new_tensor(self.cfg.MAX_DISTANCES)
        lower = torch.cat([upper.new_zeros(1), upper[:-1]])
        level = (strides[:, None] > strides.new_tensor(self.strides)).sum(1)
        fits = sides.amin(2) > 0
        fits &= to_center < self.cfg.CENTER_RADIUS * strides[:, None]
        fits &= (farthest > lower[level, None]) & (farthest <= upper[level, None])
        # Where objects overlap, a point belongs to the smallest.
        areas = torch.where(fits, target.gt_boxes.area(), float("inf"))
        index = areas.argmin(1)
        return torch.where(fits.any(1), target.gt_classes[index], labels), boxes[index]

    def point_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        points: Tensor,
        strides: Tensor,
        targets: list[Instances],
    ) -> dict[str, Tensor]:
        assigned = [self.assign(points, strides, target) for target in targets]
        labels, true_boxes = (torch.stack(x) for x in zip(*assigned, strict=True))
        positive = labels < self.num_classes
        number = max(int(positive.sum()), 1)
        get_event_storage().put_scalar("pointdet/num_positives", number / len(targets))
        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1].to(logits.dtype)
        loss_point = sigmoid_focal_loss_jit(logits, one_hot, 0.25, 2.0, reduction="sum")
        loss_box = giou_loss(boxes[positive], true_boxes[positive], reduction="sum")
        return {"loss_point": loss_point / number, "loss_box": loss_box / number}

    @torch.no_grad()
    def propose(
        self, logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best boxes of each image, with their classes and scores."""
        proposals = []
        for of_image, its_boxes, size in zip(logits.sigmoid(), boxes, image_sizes, strict=True):
            scores, index = of_image.flatten().topk(min(self.cfg.PRE_NMS_TOPK, of_image.numel()))
            found = Instances(size)
            found.pred_boxes = Boxes(its_boxes[index // self.num_classes])
            found.pred_boxes.clip(size)
            found.scores = scores
            found.pred_classes = index % self.num_classes
            found = found[found.pred_boxes.nonempty() & (scores > self.min_score)]
            proposals.append(self.nms(found, self.cfg.PROPOSAL_NMS_THRESH))
        return proposals

    @property
    def min_score(self) -> float:
        # In training the refine head needs something to learn from from the beginning.
        return 0.0 if self.training else self.cfg.SCORE_THRESH

    def nms(self, found: Instances, threshold: float) -> Instances:
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, threshold)
        return found[keep[: self.max_detections]]

    @torch.no_grad()
    def sample(self, proposals: Instances, target: Instances) -> tuple[Boxes, Tensor, Tensor]:
        """Boxes to learn from, true ones among them, with the class and the true box of each."""
        boxes = Boxes.cat([target.gt_boxes, proposals.pred_boxes])
        chosen = torch.randperm(len(boxes), device=self.device)[: self.cfg.ROIS_PER_IMAGE]
        boxes = boxes[chosen]
        if len(target) == 0:
            return boxes, chosen.new_full((len(boxes),), self.num_classes), boxes.tensor
        overlap, index = pairwise_iou(boxes, target.gt_boxes).max(1)
        labels = target.gt_classes[index].where(overlap >= 0.5, self.num_classes)
        return boxes, labels, target.gt_boxes.tensor[index]

    def refine_losses(
        self, features: list[Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        samples = [self.sample(p, t) for p, t in zip(proposals, targets, strict=True)]
        boxes, labels, true_boxes = zip(*samples, strict=True)
        logits, deltas = self.refine_head(self.pooler(features, list(boxes)))
        labels, true_boxes = cat(labels), cat(true_boxes)
        positive = labels < self.num_classes
        wanted = self.box_transform.get_deltas(
            Boxes.cat(list(boxes)).tensor[positive], true_boxes[positive]
        )
        loss_delta = smooth_l1_loss(deltas[positive], wanted, beta=1.0, reduction="sum")
        return {
            "loss_class": F.cross_entropy(logits, labels),
            "loss_delta": loss_delta / max(len(labels), 1),
        }

    def refine(self, features: list[Tensor], proposals: list[Instances]) -> list[Instances]:
        """The second look at the proposals: other boxes, and scores that both looks agree in."""
        logits, deltas = self.refine_head(self.pooler(features, [p.pred_boxes for p in proposals]))
        boxes = Boxes.cat([p.pred_boxes for p in proposals]).tensor
        numbers = [len(p) for p in proposals]
        boxes = self.box_transform.apply_deltas(deltas, boxes).split(numbers)
        refined = []
        for found, its_boxes, probabilities in zip(
            proposals, boxes, logits.softmax(1).split(numbers), strict=True
        ):
            found.pred_boxes = Boxes(its_boxes)
            found.pred_boxes.clip(found.image_size)
            second = probabilities.gather(1, found.pred_classes[:, None])[:, 0]
            found.scores = (found.scores * second).sqrt()
            refined.append(self.nms(found, self.cfg.NMS_THRESH))
        return refined

    def postprocess(self, found: list[Instances], batched_inputs: list[dict]) -> list[dict]:
        """Boxes in the images as they were before they were resized."""
        return [
            {"instances": detector_postprocess(x, image["height"], image["width"])}
            for x, image in zip(found, batched_inputs, strict=True)
        ]


def flatten_levels(maps: list[Tensor]) -> Tensor:
    """From maps (N, C, H, W) of all levels to values (N, P, C) at all points."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
