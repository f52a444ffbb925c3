"""Row 1 of Table 5 of Wu & Johnson, Rethinking "Batch" in BatchNorm, on COCO: in training all
levels are normalized together; one set of population statistics for all levels.
"""

from ..common.multi_domain import dataloader, lr_multiplier, model, optimizer, train

model.head.norm.update(statistics="shared", population="shared", affine="shared")
train.output_dir = "output/multi_domain/shared-shared-shared"
