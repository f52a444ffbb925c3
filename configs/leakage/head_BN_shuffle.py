"""BN in the heads, of RoIs that are mixed across processes before and restored after: Wu &
Johnson, Rethinking "Batch" in BatchNorm, Table 6 and Figure 9.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.name = "BN"
model.roi_heads.mask_head.conv_norm.name = "BN"
model.roi_heads.box_head.shuffle = True
model.roi_heads.mask_head.shuffle = True
train.output_dir = "output/leakage/head_BN_shuffle"
