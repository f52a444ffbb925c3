"""Batch renormalization (Ioffe 2017): batch statistics, corrected towards those of the
population.
"""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "BRN"
model.head.norm.name = "BRN"
optimizer.hooks = ["loss_spikes", "renorm", "monitor", "average"]
train.output_dir = "output/ways/BRN"
