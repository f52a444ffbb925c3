"""The keys of bn_det on any yacs CfgNode: their checks, their table, the parts that they build."""

from .keys import add_bn_det_config
from .load import load_config

__all__ = ["add_bn_det_config", "load_config"]
