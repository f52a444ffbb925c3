"""GroupNorm (Wu & He 2018)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "GN"
model.head.norm.name = "GN"
train.output_dir = "output/ways/GN"
