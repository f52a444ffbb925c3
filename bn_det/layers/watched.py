"""Whether two modules may be computed as one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what a module gets or gives, or its forward method has been replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    # Read one by one: torch 2.4 has no function that asks for them all.
    of_all_modules = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    is_hooked = any(hooks) or module._backward_pre_hooks or any(of_all_modules)
    return bool(is_hooked or "forward" in vars(module))
