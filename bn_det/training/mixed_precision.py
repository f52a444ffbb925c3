"""Mixed precision: convolutions in 16 bits, by torch's autocast; weights and statistics in float32.

The layers normalize what autocast gives them in its type, and take its statistics in float32.
"""

from __future__ import annotations

import torch

DTYPES = ("float16", "bfloat16")


def autocast(device: str | torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """What a forward pass of training runs in; it does nothing without a type."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def grad_scaler(device: str | torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """For float16, of which small gradients are 0; it does nothing with another type.

    A step whose scaled gradients overflow is left out, on all processes, which have the same
    gradients. It counts as an iteration, and its forward pass, which is finite, as one of the EMA.
    """
    return torch.amp.GradScaler(torch.device(device).type, enabled=dtype is torch.float16)
