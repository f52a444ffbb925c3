"""GroupNorm, and weight standardization (Qiao et al. 2019)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "GN"
model.head.norm.name = "GN"
model.backbone.weight_norm = "WS"
model.head.weight_norm = "WS"
train.output_dir = "output/ways/WS"
