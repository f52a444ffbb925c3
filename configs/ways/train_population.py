"""BatchNorm that normalizes by its EMA in training, too, and updates it."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.update(name="BN", train_statistics="population")
model.head.norm.update(name="BN", train_statistics="population")
train.output_dir = "output/ways/train_population"
