"""BN in the heads, of the RoIs of all processes together: Wu & Johnson, Rethinking "Batch" in
BatchNorm, Table 6.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = "SyncBN"
model.roi_heads.mask_head.conv_norm.name = "SyncBN"
train.output_dir = "output/leakage/head_SyncBN"
