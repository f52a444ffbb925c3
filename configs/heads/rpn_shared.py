"""Faster R-CNN R-50 FPN on COCO, 1x schedule, with SyncBN in the RPN's head: its five levels are
normalized together, and share population statistics. In 8 processes of 2 images.
"""

from ..common.data import dataloader
from ..common.optim import optimizer
from ..common.rcnn import faster_rcnn as model
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

model.proposal_generator.head.norm.update(name="SyncBN", statistics="shared", population="shared")
train.output_dir = "output/heads/rpn_shared"
