"""Weight normalization (Salimans & Kingma 2016), and no normalization of activations."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = ""
model.head.norm.name = ""
model.backbone.weight_norm = "WN"
model.head.weight_norm = "WN"
train.output_dir = "output/ways/WN"
