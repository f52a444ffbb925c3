"""RetinaNet R-50 FPN on COCO, 1x schedule, for the ways of docs/ways.md: each file sets what FPN
and head do. In 8 processes of 2 images.
"""

from .data import dataloader
from .optim import optimizer
from .retinanet import model
from .schedule import lr_multiplier_1x as lr_multiplier
from .train import train

optimizer.lr = 0.01
