"""Mask R-CNN on COCO from scratch, with SyncBN in backbone, FPN and heads, and population
statistics by EMA: what PreciseBN is compared with.
"""

from ..leakage.scratch_SyncBN import dataloader, lr_multiplier, model, optimizer, train

train.eval_period = 10000
train.output_dir = "output/population/mask_rcnn_EMA"
