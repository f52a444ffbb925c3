"""As rpn_shared.py, but that each level of the RPN's head is normalized by itself, and has
population statistics of its own.
"""

from .rpn_shared import dataloader, lr_multiplier, model, optimizer, train

model.proposal_generator.head.norm.update(statistics="per_domain", population="per_domain")
train.output_dir = "output/heads/rpn_per_level"
