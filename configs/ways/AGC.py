"""No normalization, and adaptive gradient clipping (Brock et al. 2021)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = ""
model.head.norm.name = ""
optimizer.agc = dict(clip_factor=0.01, eps=0.001)
train.output_dir = "output/ways/AGC"
