"""Ours: no norm in the heads, and so nothing to leak."""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = ""
model.roi_heads.mask_head.conv_norm.name = ""
train.output_dir = "output/leakage/head_none"
