"""Ours: from scratch, with SyncBN in backbone, FPN and heads. Nothing is frozen; the stride of a
bottleneck is in its 3x3 convolution, as usual without MSRA's weights. He et al., Rethinking
ImageNet Pre-training, show longer schedules.
"""

from ..common.scratch import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stem.norm.name = "SyncBN"
model.backbone.norm.name = "SyncBN"
model.roi_heads.box_head.conv_norm.name = "SyncBN"
model.roi_heads.mask_head.conv_norm.name = "SyncBN"
train.output_dir = "output/leakage/scratch_SyncBN"
