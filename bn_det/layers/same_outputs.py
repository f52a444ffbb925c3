"""Whether a model that has been changed still gives the outputs that it gave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError, reason_of


class Outputs:
    """Those of a model, by a function of it, to be compared with those of changed copies.

    Args:
        what: begins messages.
        model: is not changed, and not called.
        check: calls the model that it is given, and returns tensors, by themselves or in lists,
            tuples and dicts.

    Raises:
        InputError: ``check`` does not call what it is given, or returns no tensors, or others for
            the same model.
    """

    def __init__(self, what: str, model: nn.Module, check: Callable[[nn.Module], Any]) -> None:
        self._what, self._model, self._check = what, model, check
        dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
        self._eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        self._expected = self._outputs(self._copied())
        if not any(isinstance(value, Tensor) for value in self._expected):
            raise InputError(
                f"{what}: check: outputs without a tensor are not accepted; return tensors, by "
                "themselves or in lists, tuples and dicts"
            )
        if not self.are_those_of(lambda same: None):
            raise InputError(
                f"{what}: check: other outputs for the same model are not accepted; use the same "
                "inputs each time, and nothing that is random"
            )

    def are_those_of(self, change: Callable[[nn.Module], Any]) -> bool:
        """Whether a copy of the model that is changed so has the same ones, but for rounding."""
        changed = self._copied()
        change(changed)
        found = self._outputs(changed)
        if len(found) != len(self._expected):
            return False
        pairs = zip(found, self._expected, strict=True)
        return all(_is_same(a, b, self._eps) for a, b in pairs)

    def _copied(self) -> nn.Module:
        try:
            return copy.deepcopy(self._model)
        except Exception as e:  # of whatever the model has
            raise InputError(
                f"{self._what}: check: the model cannot be copied: {reason_of(e)}"
            ) from e

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Any]:
        modules, called = set(model.modules()), []

        def note(module: nn.Module, _: object) -> None:
            if module in modules:
                called.append(module)

        handle = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            outputs = self._check(model)
        finally:
            handle.remove()
        if not called:
            raise InputError(
                f"{self._what}: check: it does not call the model that it is given, a copy; use a "
                "function such as lambda model: model(images)"
            )
        return [v.clone() if isinstance(v, Tensor) else v for v in tree_leaves(outputs)]


def _is_same(a: Any, b: Any, eps: float) -> bool:
    """Values that are no tensors are not compared.

    Args:
        eps: of the numbers that the model computes with.
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Half of the digits: far above the rounding of a deep network, far below another function.
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    atol = max(eps, torch.finfo(b.dtype).eps) ** 0.5 * scale
    return torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True)
