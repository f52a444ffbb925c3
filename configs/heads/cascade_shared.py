"""Cascade Mask R-CNN R-50 FPN on COCO as in Detectron2's
configs/Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml, but with box heads of 4 convolutions with SyncBN
and 1 fully connected layer: RoIs from all four levels are normalized together, and share
population statistics. In 8 processes of 2 images.
"""

from ..common.cascade import model
from ..common.data import dataloader
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

model.proposal_generator.post_nms_topk = [2000, 1000]
for _head in model.roi_heads.box_heads:
    _head.conv_norm.name = "SyncBN"
dataloader.train.mapper.use_instance_mask = True
train.output_dir = "output/heads/cascade_shared"
