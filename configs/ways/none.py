"""No normalization."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = ""
model.head.norm.name = ""
train.output_dir = "output/ways/none"
