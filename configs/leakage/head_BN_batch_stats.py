"""BN in the heads, evaluated with the statistics of the RoIs of each test image: Wu & Johnson,
Rethinking "Batch" in BatchNorm, Table 3. Training is that of head_BN.py, whose model can be
evaluated with this config and --eval-only.
"""

from ..common.leakage import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.conv_norm.update(name="BN", eval_statistics="batch")
model.roi_heads.mask_head.conv_norm.update(name="BN", eval_statistics="batch")
train.output_dir = "output/leakage/head_BN_batch_stats"
