"""BatchNorm whose population statistics are recomputed on the model as it is, before each
evaluation and each checkpoint.
"""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "BN"
model.head.norm.name = "BN"
optimizer.hooks = ["loss_spikes", "monitor", "precise_bn", "average"]
train.output_dir = "output/ways/PreciseBN"
