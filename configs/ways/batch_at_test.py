"""BatchNorm that normalizes by batch statistics at test time, too: by those of each test image."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.update(name="BN", eval_statistics="batch")
model.head.norm.update(name="BN", eval_statistics="batch")
train.output_dir = "output/ways/batch_at_test"
