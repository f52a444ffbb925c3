"""Ours: FrozenBN in the heads. They are not pre-trained, so that its statistics and its affine
stay those of the identity: no norm, and no bias in the convolutions.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = "FrozenBN"
model.roi_heads.mask_head.conv_norm.name = "FrozenBN"
train.output_dir = "output/leakage/head_FrozenBN"
