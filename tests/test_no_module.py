"""What every public function says of a model that is none."""

import pytest
import torch
from torch import nn

import bn_det
from bn_det.errors import InputError

CALLS = {
    "average_population_statistics": bn_det.average_population_statistics,
    "bake_weight_norms": bn_det.bake_weight_norms,
    "convert_batchnorm": lambda model: bn_det.convert_batchnorm(model, bn_det.BatchNorm2d),
    "evaluated_losses": lambda model: bn_det.evaluated_losses(model).__enter__(),
    "evaluated_with": lambda model: bn_det.evaluated_with(model, "batch").__enter__(),
    "examine": bn_det.examine,
    "freeze": bn_det.freeze,
    "fuse": bn_det.fuse,
    "ghost_groups": lambda model: bn_det.ghost_groups(model, torch.zeros(2)).__enter__(),
    "name_layers": bn_det.name_layers,
    "no_population_update": lambda model: bn_det.no_population_update(model).__enter__(),
    "shuffled": bn_det.shuffled,
    "states": bn_det.states,
    "thaw": bn_det.thaw,
    "trained_with": lambda model: bn_det.trained_with(model, "population").__enter__(),
    "tune": bn_det.tune,
    "unchanged_statistics": lambda model: bn_det.unchanged_statistics(model).__enter__(),
    "unfold": lambda model: bn_det.unfold(model, [torch.zeros(1)]),
    "unfuse": bn_det.unfuse,
    "update_bn_stats": lambda model: bn_det.update_bn_stats(model, [torch.zeros(1)], 1),
    "virtual_batch": lambda model: bn_det.virtual_batch(model, [torch.zeros(1)]).__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "model, kind", [([nn.BatchNorm2d(2)], "list"), (None, "NoneType"), (nn.BatchNorm2d, "type")]
)
def test_what_is_no_module(name, model, kind):
    words = f"(model|module): what is given is of type {kind}; use a(n)? (torch.)?nn.Module"
    with pytest.raises(InputError, match=words):
        CALLS[name](model)
