"""Local response normalization (Krizhevsky et al. 2012)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "LRN"
model.head.norm.name = "LRN"
train.output_dir = "output/ways/LRN"
