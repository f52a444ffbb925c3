"""Small models and batches of Detectron2, and steps with them."""

import copy
from functools import partial

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

import hosts
from reference import randomize

make_cfg = partial(hosts.make_cfg, "detectron2")

STOCK_RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
]


def make_batch(num_objects, size=128):
    """An image for each number of objects."""
    inputs = []
    for number in num_objects:
        instances = Instances((size, size))
        corners = torch.rand(number, 2) * size / 2
        boxes = torch.cat([corners, corners + 20 + torch.rand(number, 2) * 30], 1)
        x0, y0, x1, y1 = boxes.T.double().numpy()
        polygons = [[p] for p in zip(x0, y0, x1, y0, x1, y1, x0, y1, strict=True)]
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(number) % 4
        instances.gt_masks = PolygonMasks(polygons)
        inputs.append({"image": torch.randint(0, 256, (3, size, size)), "instances": instances})
    return inputs


def losses_of(model, inputs):
    with EventStorage():
        return model(inputs)


def train_step(model, inputs):
    losses = losses_of(model, inputs)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.isfinite(), name
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"DDP would wait for {name}"
        assert p.grad is None or p.grad.isfinite().all(), name
    return losses


def check_checkpoints(ours, theirs, folder, inputs):
    """That those of either model load into the other, which then has the same losses."""
    for source, target in ((theirs, ours), (ours, theirs)):
        randomize(source)
        DetectionCheckpointer(source, str(folder)).save("model")
        checkpointer, incompatible = DetectionCheckpointer(target), []
        checkpointer._log_incompatible_keys = incompatible.append
        checkpointer.load(str(folder / "model.pth"))
        assert incompatible == [([], [], [])]
        found = []
        for model in (target, source):
            torch.manual_seed(4)  # the sampling of anchors and RoIs
            found.append(train_step(model, copy.deepcopy(inputs)))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # float32
