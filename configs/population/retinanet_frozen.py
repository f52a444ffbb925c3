"""As retinanet_EMA.py, with BN frozen in the last fifth of the training, right after PreciseBN
(Wu & Johnson, Rethinking "Batch" in BatchNorm, freeze it in the last 20 of 100 epochs).
"""

from .retinanet_EMA import dataloader, lr_multiplier, model, optimizer, train

optimizer.hooks = ["loss_spikes", "freeze_bn", "monitor", "average"]
optimizer.hook_nodes.freeze_bn.iteration = 216000
train.output_dir = "output/population/retinanet_frozen"
