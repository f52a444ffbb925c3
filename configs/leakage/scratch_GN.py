"""Ours: from scratch, with GN in backbone, FPN and heads. Nothing is frozen; the stride of a
bottleneck is in its 3x3 convolution, as usual without MSRA's weights. He et al., Rethinking
ImageNet Pre-training, show longer schedules.
"""

from ..common.scratch import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stem.norm.name = "GN"
model.backbone.norm.name = "GN"
model.roi_heads.box_head.conv_norm.name = "GN"
model.roi_heads.mask_head.conv_norm.name = "GN"
train.output_dir = "output/leakage/scratch_GN"
