"""BatchNorm whose training leaves the population statistics alone: PreciseBN makes them before
each evaluation and each checkpoint.
"""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.update(name="BN", update_population=False)
model.head.norm.update(name="BN", update_population=False)
optimizer.hooks = ["loss_spikes", "monitor", "precise_bn", "average"]
train.output_dir = "output/ways/no_update"
