"""Ours: GN in the heads, which normalizes each RoI by itself and has nothing to leak."""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = "GN"
model.roi_heads.mask_head.conv_norm.name = "GN"
train.output_dir = "output/leakage/head_GN"
