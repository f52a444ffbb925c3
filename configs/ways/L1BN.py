"""BatchNorm by the mean absolute deviation (Hoffer et al. 2018)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "L1BN"
model.head.norm.name = "L1BN"
train.output_dir = "output/ways/L1BN"
