"""BatchNorm as a constant scale and shift. Where FPN and head have no trained statistics, that is
no normalization.
"""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "FrozenBN"
model.head.norm.name = "FrozenBN"
train.output_dir = "output/ways/FrozenBN"
