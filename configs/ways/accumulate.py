"""BatchNorm as in BN.py, and two batches for each step of the optimizer: a larger SGD batch, the
same normalization batch.
"""

from detectron2.config import LazyCall as L

from bn_det.d2.lazy import EachStep

from ..common.way import dataloader, model, optimizer, train
from ..common.way import lr_multiplier as _lr_multiplier

model.backbone.norm.name = "BN"
model.head.norm.name = "BN"
# Iterations are batches here: twice as many of everything.
optimizer.accumulate = 2
train.max_iter = 2 * 90000
train.checkpointer.period = 2 * 5000
lr_multiplier = L(EachStep)(
    scheduler=_lr_multiplier, accumulate="${optimizer.accumulate}", max_iter="${train.max_iter}"
)
train.output_dir = "output/ways/accumulate"
