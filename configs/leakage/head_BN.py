"""BN in the heads, of the RoIs of each process: Wu & Johnson, Rethinking "Batch" in BatchNorm,
Table 3, and what the remedies of Table 6 are compared with.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = "BN"
model.roi_heads.mask_head.conv_norm.name = "BN"
train.output_dir = "output/leakage/head_BN"
