"""leakage.py from scratch. Nothing is frozen; the stride of a bottleneck is in its 3x3 convolution,
as usual without MSRA's weights.
"""

from detectron2.config import LazyCall as L

from bn_det.d2.lazy import make_norm

from .leakage import dataloader, lr_multiplier, model, optimizer, train

_bottom_up = model.backbone.bottom_up
_bottom_up.freeze_at = 0
_bottom_up.stem.norm = L(make_norm)(name="")
_bottom_up.stages.stride_in_1x1 = False
train.init_checkpoint = ""
