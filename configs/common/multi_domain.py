"""RetinaNet R-50 FPN on COCO with SyncBN in the head, for the rows of Table 5 of Wu & Johnson,
Rethinking "Batch" in BatchNorm: the 3x schedule. In 8 processes of 2 images.
"""

from .data import dataloader
from .optim import optimizer
from .retinanet import model
from .schedule import lr_multiplier_3x as lr_multiplier
from .train import train

model.head.norm.name = "SyncBN"
optimizer.lr = 0.01
train.max_iter = 270000
