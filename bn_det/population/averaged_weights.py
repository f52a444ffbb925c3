"""The weights of several checkpoints averaged, and population statistics to go with them.

An average of weights (Izmailov et al., *Averaging Weights Leads to Wider Optima and Better
Generalization*, 2018) is a model that no training has seen, so that no statistics belong to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError, choose
from ..layers.kinds import STATE
from ..layers.state_dicts import State, first_difference

STATISTICS = ("copied", "averaged", "pooled")
"""Of the last checkpoint; means of all, variances too; or with the spread of the means."""


def averaged_state(states: Sequence[State], statistics: str) -> dict[str, Tensor]:
    """The mean of several models' weights, each counted alike, with population statistics.

    Args:
        states: state dicts of the same model.
        statistics: one of STATISTICS.

    Returns:
        a state dict; what is no floating point number is the last one's.

    Raises:
        InputError: a state dict has other names or shapes than the first.
    """
    choose("statistics", statistics, STATISTICS)
    for number, state in enumerate(states[1:], 2):
        if different := first_difference(states[0], state):
            name, of_first, of_other = different
            raise InputError(
                f"checkpoints 1 and {number} are of different models: {name} is {of_first} in the "
                f"first, and {of_other} in the other"
            )
    averaged = {
        name: _mean([state[name] for state in states]) if value.is_floating_point() else value
        for name, value in states[-1].items()
    }
    of_statistics = [name for name in averaged if name.rpartition(".")[2] in STATE[:2]]
    if statistics == "copied":
        averaged.update((name, states[-1][name]) for name in of_statistics)
    elif statistics == "pooled":
        for name in of_statistics:
            if name.endswith("running_var"):
                mean = name.removesuffix("var") + "mean"
                means = torch.stack([state[mean].double() for state in states])
                spread = means.var(0, correction=0)
                averaged[name] = (averaged[name].double() + spread).to(averaged[name].dtype)
    return averaged


def _mean(values: Sequence[Tensor]) -> Tensor:
    mean = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        mean += value.double()
    return (mean / len(values)).to(values[0].dtype)
