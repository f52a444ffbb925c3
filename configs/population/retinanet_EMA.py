"""RetinaNet on COCO with SyncBN in the head, each level by itself (row 4 of Table 5 of Wu &
Johnson, Rethinking "Batch" in BatchNorm), and population statistics by EMA: what PreciseBN is
compared with.
"""

from ..common.multi_domain import dataloader, lr_multiplier, model, optimizer, train

model.head.norm.update(statistics="per_domain", population="per_domain", affine="shared")
train.eval_period = 10000
train.output_dir = "output/population/retinanet_EMA"
