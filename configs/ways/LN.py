"""LayerNorm over the channels of each position (Ba et al. 2016; with images as in ConvNeXt)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "LN"
model.head.norm.name = "LN"
train.output_dir = "output/ways/LN"
