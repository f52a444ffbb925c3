"""Row 2 of Table 5 of Wu & Johnson, Rethinking "Batch" in BatchNorm, on COCO: in training all
levels are normalized together; population statistics per level. They are recomputed by PreciseBN,
level by level.
"""

from ..common.multi_domain import dataloader, lr_multiplier, model, optimizer, train

model.head.norm.update(statistics="shared", population="per_domain", affine="shared")
optimizer.hooks = ["loss_spikes", "monitor", "precise_bn", "average"]
train.output_dir = "output/multi_domain/shared-per_domain-shared"
