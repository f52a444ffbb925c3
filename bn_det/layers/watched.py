"""Whether two modules may be computed as one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what a module gets or gives, or its forward method has been replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    is_hooked = any(hooks) or module._backward_pre_hooks or _has_any_global_hook()
    return bool(is_hooked or "forward" in vars(module))
