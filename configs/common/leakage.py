"""Mask R-CNN R-50 FPN on COCO as in Wu & Johnson, Rethinking "Batch" in BatchNorm: the 3x schedule,
and a box head of 4 convolutions and 1 fully connected layer. Each file that builds on it sets the
heads' norm. In 8 processes of 2 images.
"""

from .data import dataloader
from .optim import optimizer
from .rcnn import mask_rcnn as model
from .schedule import lr_multiplier_3x as lr_multiplier
from .train import train

model.roi_heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024])
dataloader.train.mapper.use_instance_mask = True
train.max_iter = 270000
