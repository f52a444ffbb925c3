"""Ours: BN in the heads of a part of the process's RoIs. The box head has 1024 of them, the mask
head those on objects, at most 256. In order they are image by image, those on objects first; at
random, each part is like the whole.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.update(name="GhostBN", ghost_size=128, ghost_order="random")
model.roi_heads.mask_head.conv_norm.update(name="GhostBN", ghost_size=32, ghost_order="random")
train.output_dir = "output/leakage/head_GhostBN"
