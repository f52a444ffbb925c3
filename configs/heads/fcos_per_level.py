"""As fcos_shared.py, but that each level of the head is normalized by itself, and has population
statistics of its own.
"""

from .fcos_shared import dataloader, lr_multiplier, model, optimizer, train

model.head.norm.update(statistics="per_domain", population="per_domain")
train.output_dir = "output/heads/fcos_per_level"
