"""A model in another mode, for a while, and in no other by what a caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputError
from ..population.calling import called


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Have all of a model in training mode, or in evaluation mode; then each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_called(
    model: nn.Module, call: Callable[[nn.Module, Any], Any] | None
) -> Callable[[Any], Any]:
    """How a model is run on a batch; that a user's function leaves it in its mode is checked.

    What the model does with its modes by itself is its own.

    Raises:
        InputError: from what is returned, if a module is in another mode as the model is called.
    """
    run_on = called(model, call)
    if call is None:
        return run_on

    def run(batch: Any) -> Any:
        modes = [(name, module, module.training) for name, module in model.named_modules()]
        checked: list[bool] = []

        def check(*_: object) -> None:
            if checked:
                return
            checked.append(True)
            for name, module, mode in modes:
                if module.training != mode:
                    raise InputError(
                        f"call: it puts {name or 'the model'} into "
                        f"{'training' if module.training else 'evaluation'} mode; call the model "
                        "in the mode that it is in, without train() and eval()"
                    )

        hook = model.register_forward_pre_hook(check, prepend=True)
        try:
            outputs = run_on(batch)
        finally:
            hook.remove()
        check()  # of a function that calls parts of the model alone
        return outputs

    return run
