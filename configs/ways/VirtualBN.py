"""BatchNorm over the samples of each process and as many extra images, which have no gradient
(after Salimans et al. 2016).
"""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.name = "BN"
model.head.norm.name = "BN"
optimizer.hooks = ["loss_spikes", "virtual_batch", "monitor", "average"]
optimizer.hook_nodes.virtual_batch.data_loader.total_batch_size = 16
train.output_dir = "output/ways/VirtualBN"
