"""The anchors of the shapes configs suit the objects of the data set."""

import torch
from torchvision.ops import box_iou

from bn_det.config.load import load_config
from bn_det.data.shapes import IMAGE_SIZE, SHAPES, draw_image
from bn_det.tv import build_model, get_cfg
from reference import BASE


def test_every_level_gets_positives():
    cfg = get_cfg()
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu"], "torchvision")
    model = build_model(cfg)
    sizes = [IMAGE_SIZE // 2**k for k in range(3, 8)]
    images, _ = model.transform([torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)])
    features = [torch.zeros(1, 64, s, s) for s in sizes]
    anchors = model.anchor_generator(images, features)[0]
    level = torch.arange(5).repeat_interleave(torch.tensor([2 * s * s for s in sizes]))
    positives = torch.zeros(5)
    reached = total = 0
    for index in range(200):
        _, objects = draw_image(SHAPES.splits["train"].seed, index)
        boxes = torch.tensor([o["bbox"] for o in objects])
        boxes[:, 2:] += boxes[:, :2]
        iou = box_iou(boxes, anchors)
        # What a level gets by overlap alone, without the best anchor that each object is given.
        positives += torch.bincount(level[(iou >= 0.5).any(0)], minlength=5)
        reached += (iou >= 0.5).any(1).sum()
        total += len(objects)
    assert (positives >= 10).all(), positives
    assert reached / total > 0.8
