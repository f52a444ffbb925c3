"""Faster R-CNN R-50 FPN on COCO, 1x schedule, with SyncBN in the RPN's head: its five levels are
normalized together, and share population statistics. In 8 processes of 2 images.
"""

from detectron2.config import LazyCall as L

from bn_det.d2 import BNRPNHead
from bn_det.d2.lazy import make_norm

from ..common.data import dataloader
from ..common.optim import optimizer
from ..common.rcnn import faster_rcnn as model
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

model.proposal_generator.head.update(
    _target_=BNRPNHead,
    norm=L(make_norm)(
        name="SyncBN", num_levels=5, statistics="shared", population="shared", affine="shared"
    ),
    weight_norm="",
)
train.output_dir = "output/heads/rpn_shared"
