"""BatchNorm whose population statistics are final."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from .batch import refuse_list
from .kernels import normalize_one
from .mixed import MixedIn

fx.wrap("normalize_one")  # by which torch.fx traces a model that is frozen, as it does torch's own


class FrozenBatchNorm(_NormBase):
    """What a BatchNorm becomes by :func:`bn_det.freeze`, and ceases to be by :func:`bn_det.thaw`.

    It normalizes by its population statistics, in training, too, and never updates them. Its state
    dict is that of the layer that it was. It is no BatchNorm by type, so that nothing that walks
    over a model (``convert_sync_batchnorm``, fvcore's PreciseBN, our functions) takes it for one
    that moves.

    Where neither weight nor bias is trained, nothing but a scale per channel is held for the
    backward pass, as by Detectron2's FrozenBatchNorm2d.

    Attributes:
        thawed_type: the class of the layer that it was, whose attributes are all still there; one
            that is made as it is, is of BatchNorm2d.

    Shape:
        as of the layer that it was; an empty input gives an empty output.
    """

    thawed_type: type[_NormBase] = nn.BatchNorm2d

    def _check_input_dim(self, x: Tensor) -> None:
        refuse_list(x)
        self.thawed_type._check_input_dim(self, x)

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        del groups  # of ours in training; it has no batch
        if not isinstance(x, fx.Proxy):
            self._check_input_dim(x)
        statistics = self.running_mean, self.running_var
        return normalize_one(x, *statistics, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, was={self.thawed_type.__name__}"


class StaysInEvaluation(MixedIn):
    """Mixed into the class of a layer that is frozen as it is, as it may do more than normalize.

    In evaluation mode, which it never leaves, it normalizes by its population statistics.

    Attributes:
        thawed_type: the class that it had.
        asked_mode: what :meth:`train` was last asked for.
    """

    made_name, made_from = "Frozen{}", "thawed_type"
    thawed_type: type[_NormBase]

    def train(self, mode: bool = True) -> Any:
        self.asked_mode = mode
        return super().train(False)
