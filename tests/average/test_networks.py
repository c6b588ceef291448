"""fuse: the average of aligned networks. It depends on no order and touches nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.average.couplings import couplings_of
from intrafusion.average.statistics import reestimate_
from intrafusion.groups.places import load_state_, permuted, random_orders, state_of
from tests.average.test_align import furthest, widened
from tests.average.test_couplings import ATTENTION, CASES, shuffled
from tests.nets import PICO, Plain, randomise_

PLAIN, RESIDUAL, CONCAT = PICO[0], PICO[1], PICO[2]


def others(case, count: int) -> list[nn.Module]:
    """Networks of one architecture with different weights."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed + 20)
        model = randomise_(case.build())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        found.append(model)
    return found


def same_up_to_order(first: nn.Module, second: nn.Module, x) -> float:
    with torch.no_grad():
        return float((first(x) - second(x)).abs().max() / second(x).abs().max())


@pytest.mark.parametrize("by", ["weights", "matching"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_network_and_its_permuted_copies_fuse_into_the_network(case, by):
    model, other, _ = shuffled(case)
    third = shuffled(case, seed=8)[1]
    fused = intrafusion.fuse([other, model, third], case.example(), by=by)
    assert same_up_to_order(fused, model, case.example()) < 1e-5
    back = intrafusion.align(fused, model, case.example()).apply(fused)
    assert furthest(back, model) < 1e-5


@pytest.mark.parametrize("by", ["weights", "activations", "matching", "given"])
def test_the_order_of_the_networks_does_not_matter(by):
    networks, x = others(RESIDUAL, 3), RESIDUAL.example()
    shares = [0.5, 0.3, 0.2]
    batches = [torch.randn(1000, 3, 6, 6)]  # enough for no synthetic ones to be added
    results = [
        intrafusion.fuse([networks[i] for i in order], x, [shares[i] for i in order], by=by, batches=batches)
        for order in itertools.permutations(range(3))
    ]
    assert all(furthest(result, results[0]) < 1e-6 for result in results[1:])


def test_a_common_permutation_of_one_network_does_not_change_the_function_of_the_result():
    networks, x = others(RESIDUAL, 2), RESIDUAL.example()
    groups = couplings_of(networks[1], x).groups
    moved = copy.deepcopy(networks[1])
    load_state_(moved, permuted(state_of(moved), groups, random_orders(groups, torch.Generator().manual_seed(2))))
    results = [intrafusion.fuse([networks[0], other], x, [0.6, 0.4], by="weights") for other in (networks[1], moved)]
    assert same_up_to_order(*results, x) < 1e-5


def test_the_barycentre_is_nearer_to_all_than_a_chain_would_be():
    """Three networks: what the rounds minimise must not be more than what alignment to one of them gives."""
    from intrafusion.average.matching import comparable
    from intrafusion.average.orders import common_orders

    networks, x = others(CONCAT, 4), CONCAT.example()
    couplings, states = couplings_of(networks[0], x), [state_of(net) for net in networks]

    def spread(by: str) -> float:
        orders = common_orders(
            networks, states, [0.25] * 4, couplings, lambda net, batch: net(*batch), [(x,)], by=by, seed=0
        )
        views = [comparable(permuted(s, couplings.groups, o), couplings) for s, o in zip(states, orders, strict=True)]
        pairs = itertools.combinations(views, 2)
        return sum(float((a[key].double() - b[key].double()).square().sum()) for a, b in pairs for key in a)

    assert spread("matching") < spread("weights")


def test_one_network_is_itself_and_weights_choose():
    first, second = others(PLAIN, 2)
    assert furthest(intrafusion.fuse([first], PLAIN.example()), first) < 1e-6
    assert furthest(intrafusion.fuse([second, first], PLAIN.example(), [0, 2]), first) < 1e-6


def test_parameters_are_the_weighted_average():
    first, second = others(PLAIN, 2)
    fused = intrafusion.fuse([first, second], PLAIN.example(), [3, 1], by="given", repair="none")
    for name, tensor in state_of(fused).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * state_of(first)[name] + 0.25 * state_of(second)[name])


def test_the_closed_form_is_the_variance_of_averaged_filters_on_white_inputs():
    """Oracle: a convolution's batch-norm, re-estimated on white noise, where the formula is exact."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval() for _ in range(2)
    ]
    noise = [(torch.randn(400, 4, 9, 9),)]
    for network in networks:
        reestimate_(network, lambda net, batch: net(*batch), noise)
    fused = intrafusion.fuse(networks, noise[0][0][:2], by="given", repair="statistics")
    measured = copy.deepcopy(fused)
    reestimate_(measured, lambda net, batch: net(*batch), noise)
    torch.testing.assert_close(fused[1].running_var, measured[1].running_var, rtol=0.03, atol=0)
    collapsed = intrafusion.fuse(networks, noise[0][0][:2], by="given", repair="none")
    assert (collapsed[1].running_var > 1.3 * measured[1].running_var).all()


def test_batches_re_estimate_every_batch_norm():
    networks, batch = others(RESIDUAL, 2), torch.randn(64, 3, 6, 6)
    fused = intrafusion.fuse(networks, RESIDUAL.example(), batches=[batch], repair="statistics")
    seen = {}
    fused.bn0.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    fused(batch)
    torch.testing.assert_close(fused.bn0.running_mean, seen["x"].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.bn0.running_var, seen["x"].var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def far_from_the_mean(fused: nn.Module, networks: list[nn.Module], x) -> float:
    """Squared distance of the network's output from the mean of its parents', as a share of the mean's own square."""
    with torch.no_grad():
        mean = torch.stack([network(x) for network in networks]).mean(dim=0)
        return float((fused(x) - mean).square().sum() / mean.square().sum())


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_refitted_layers_bring_the_output_to_the_mean_of_the_parents(case):
    networks, batches = others(case, 2), [torch.randn(64, *case.shape) for _ in range(4)]
    options = {"batches": batches, "progress": False}
    statistics, refitted = (
        intrafusion.fuse(networks, case.example(), repair=repair, **options) for repair in ("statistics", "refit")
    )
    x = torch.randn(256, *case.shape)
    before, after = (far_from_the_mean(fused, networks, x) for fused in (statistics, refitted))
    assert after < 0.6 * before


def test_without_inputs_layers_are_refitted_on_what_batch_norms_remember():
    """And without batch-norms, which remember, the weights are averaged as they are."""
    networks, x = others(RESIDUAL, 2), torch.randn(256, *RESIDUAL.shape)
    for network in networks:
        reestimate_(network, lambda net, batch: net(*batch), [(x,)])
    statistics, refitted = (
        intrafusion.fuse(networks, RESIDUAL.example(), repair=repair, progress=False)
        for repair in ("statistics", "refit")
    )
    assert far_from_the_mean(refitted, networks, x) < far_from_the_mean(statistics, networks, x)
    plain = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
    averaged, kept = (intrafusion.fuse(plain, torch.randn(2, 4), repair=repair) for repair in ("none", "refit"))
    assert furthest(averaged, kept) == 0


def test_networks_of_different_widths_meet_at_the_narrowest_in_any_order():
    model = PLAIN.model()
    results = [intrafusion.fuse(pair, PLAIN.example()) for pair in ([model, widened(model)], [widened(model), model])]
    assert furthest(*results) < 1e-6
    assert same_up_to_order(results[0], model, PLAIN.example()) < 1e-4


def test_nothing_given_is_touched():
    networks = others(ATTENTION, 2)
    networks[1].train()
    before = [copy.deepcopy(net.state_dict()) for net in networks]
    fused = intrafusion.fuse(networks, ATTENTION.example(), batches=[torch.randn(8, 3, 5)])
    for net, old in zip(networks, before, strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in net.state_dict().items())
    assert networks[1].training
    assert not fused.training


def test_a_failed_re_estimation_leaves_the_statistics_alone():
    model = PLAIN.model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot be re-estimated"):
        reestimate_(model, lambda net, batch: net(*batch), [(torch.randn(8, 3, 8, 8),), (torch.randn(8, 4, 8, 8),)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not model.bn1.training


class TestErrors:
    x = PLAIN.example()

    @pytest.mark.parametrize(
        ("models", "error", "message"),
        [
            ([], ValueError, "there are no networks to fuse"),
            (Plain(), TypeError, "models must be a list of networks"),
            ([Plain(), "net.pt"], TypeError, "network 1 must be an nn.Module, not str"),
            ([Plain(), RESIDUAL.model()], ValueError, "only network 1 has 'a.bias'"),
        ],
    )
    def test_models(self, models, error, message):
        with pytest.raises(error, match=message):
            intrafusion.fuse(models, self.x)

    def test_nan(self):
        bad = PLAIN.model()
        bad.fc1.weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match=r"'fc1\.weight' of network 1 holds NaN or infinite"):
            intrafusion.fuse([PLAIN.model(), bad], self.x)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1], "1 weights for 2"),
            ([1, -1], "numbers >= 0"),
            ([0, 0], "not all 0"),
            ([1, float("nan")], "numbers >= 0"),
        ],
    )
    def test_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            intrafusion.fuse(others(PLAIN, 2), self.x, weights)

    def test_settings(self):
        with pytest.raises(ValueError, match="by is 'magic'"):
            intrafusion.fuse(others(PLAIN, 2), self.x, by="magic")
        with pytest.raises(ValueError, match="repair is 'yes': choose one of 'refit', 'statistics', 'none'"):
            intrafusion.fuse(others(PLAIN, 2), self.x, repair="yes")
        with pytest.raises(ValueError, match="calibration batch 0 holds NaN"):
            intrafusion.fuse(others(PLAIN, 2), self.x, batches=[torch.full((4, *PLAIN.shape), torch.nan)])
        with pytest.raises(ValueError, match="the calibration iterable is empty"):
            intrafusion.fuse(others(PLAIN, 2), self.x, batches=[])
        with pytest.raises(ValueError, match="different widths"):
            intrafusion.fuse([PLAIN.model(), widened(PLAIN.model())], self.x, by="given")
