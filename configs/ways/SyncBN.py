"""BatchNorm over the samples of all processes."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "SyncBN"
model.head.norm.name = "SyncBN"
train.output_dir = "output/ways/SyncBN"
