"""BatchNorm over the samples of each process: what the other ways are compared with."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "BN"
model.head.norm.name = "BN"
train.output_dir = "output/ways/BN"
