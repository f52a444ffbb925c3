from .config import add_pointdet_config
from .detector import PointDet

__all__ = ["PointDet", "add_pointdet_config"]
