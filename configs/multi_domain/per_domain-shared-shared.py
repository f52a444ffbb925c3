"""Row 3 of Table 5 of Wu & Johnson, Rethinking "Batch" in BatchNorm, on COCO: in training each
level is normalized by itself; one set of population statistics for all levels.
"""

from ..common.multi_domain import dataloader, lr_multiplier, model, optimizer, train

model.head.norm.update(statistics="per_domain", population="shared", affine="shared")
train.output_dir = "output/multi_domain/per_domain-shared-shared"
