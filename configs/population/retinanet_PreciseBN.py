"""As retinanet_EMA.py, with population statistics that PreciseBN recomputes before each
evaluation and each checkpoint (Wu & Johnson, Rethinking "Batch" in BatchNorm, Sec. 3).
"""

from .retinanet_EMA import dataloader, lr_multiplier, model, optimizer, train

optimizer.hooks = ["loss_spikes", "monitor", "precise_bn", "average"]
train.output_dir = "output/population/retinanet_PreciseBN"
