"""As cascade_shared.py, but that the RoIs from each level are normalized by themselves, and have
population statistics of their own.
"""

from .cascade_shared import dataloader, lr_multiplier, model, optimizer, train

for _head in model.roi_heads.box_heads:
    _head.conv_norm.update(
        num_roi_levels=4, statistics="per_domain", population="per_domain", affine="shared"
    )
train.output_dir = "output/heads/cascade_per_level"
