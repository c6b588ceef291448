"""A weight that is computed (a parametrisation, a norm, a mask) is refused by name, and what undoes it works."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

from intrafusion import FusionError, IntraFusionPruner
from tests.prune.test_refusals import PRESETS, l1


def sn(layer):
    return spectral_norm(layer)


def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def scaled_weight(layer):
    class Scaled(nn.Module):
        def forward(self, weight):
            return weight / weight.norm()

    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


UNDO = {
    "weight_norm": (weight_norm, remove_weight_norm, "torch.nn.utils.remove_weight_norm(model[0])"),
    "spectral_norm": (sn, nn.utils.remove_spectral_norm, "torch.nn.utils.remove_spectral_norm(model[0])"),
    "orthogonal": (
        parametrizations.orthogonal,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "remove_parametrizations(model[0], 'weight')",
    ),
    "a parametrisation of one's own": (
        scaled_weight,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "remove_parametrizations(model[0], 'weight')",
    ),
    "a mask": (masked, lambda layer: prune.remove(layer, "weight"), "torch.nn.utils.prune.remove(model[0], 'weight')"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fusion", PRESETS)
@pytest.mark.parametrize("name", UNDO)
def test_a_computed_weight_is_refused_with_the_call_that_makes_it_plain(name, fusion):
    torch.manual_seed(0)
    put_on, take_off, said = UNDO[name]
    model = nn.Sequential(put_on(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    model(torch.randn(2, 6))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(64, 6)
    more = {"calibration": [x]} if fusion == "calibrated" else {}
    pruner = IntraFusionPruner(model, x[:2], l1(), ignored_layers=[model[4]], fusion=fusion, **more)
    with pytest.raises(FusionError) as caught:
        pruner.step()
    assert said in str(caught.value)
    assert "'0'" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    take_off(model[0])
    pruner = IntraFusionPruner(model, x[:2], l1(), ignored_layers=[model[4]], fusion=fusion, **more)
    pruner.step()
    assert model(x).shape == (64, 3)
    assert model[0].out_features == 8
