"""The rivals: each one's formula on networks where the answer is known, and every one on every pico network."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from benchmarks.rivals import base, lbyl
from benchmarks.rivals.base import ignored_layers, reestimate_
from benchmarks.rivals.folding import cluster, repair_factor
from benchmarks.rivals.grail import RIDGE, reconstruct
from benchmarks.rivals.lbyl import candidate, combine
from benchmarks.rivals.methods import METHODS, Entry
from benchmarks.rivals.neuron_merging import merge_into_nearest
from intrafusion import Fusion
from tests.nets import PICO, Case, Mlp, Plain, randomise_

EXACT_LBYL = candidate(1.0, 1e-9)


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


def images(shape: tuple[int, ...] = (3, 8, 8), batches: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(6, *shape, generator=generator) for _ in range(batches)]


def duplicated() -> nn.Module:
    """`Plain` whose first eight channels are four different ones, twice, the copies read by weights of their own."""
    torch.manual_seed(0)
    model = randomise_(Plain())
    with torch.no_grad():
        for tensor in (model.conv1.weight, *model.bn1.parameters(), model.bn1.running_mean, model.bn1.running_var):
            tensor[4:] = tensor[:4]
        model.conv2.weight[:, 4:] = 0.9 * model.conv2.weight[:, :4]
    return model.eval()


def first_channels(group) -> torch.Tensor:
    """An importance that keeps the first channels: one of each of the duplicates."""
    return torch.arange(len(group[0].idxs), 0.0, -1.0)


def pruned(name: str, model: nn.Module, data=None) -> nn.Module:
    return base.pruned(Fusion(merge=name), model, ["conv1"], 0.5, first_channels, torch.zeros(1, 3, 8, 8), data)


@pytest.mark.parametrize("name", ["Folding", "Fold-AR", "Neuron Merging", EXACT_LBYL])
def test_duplicates_merge_exactly(name):
    model, (data, _) = duplicated(), images()
    merged = pruned(name, model)
    assert merged.conv1.out_channels == 4
    torch.testing.assert_close(merged(data), model(data), rtol=1e-4, atol=1e-4)


def test_grail_merges_duplicates_up_to_its_ridge():
    model, data = duplicated(), images()
    error = (pruned("GRAIL", model, data)(data[0]) - model(data[0])).norm()
    loss = (pruned("selection", model)(data[0]) - model(data[0])).norm()
    assert error < 0.02 * loss


def test_clusters_stay_in_their_class_and_fill_the_places_of_their_kept_channels():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    points = centres.repeat_interleave(3, dim=0) + 0.01 * torch.randn(12, 5, generator=generator)
    classes = torch.arange(12) // 6
    membership = cluster(points, torch.tensor([1, 5, 7, 10]), classes)
    assert torch.equal(membership.argmax(dim=1), torch.arange(12) // 3)
    assert torch.equal(membership.sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_fold_ar_factor_restores_the_deviation_of_a_mean_of_correlated_signals():
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    filters = common + torch.randn(5, 40, generator=generator, dtype=torch.float64)
    filters /= filters.norm(dim=1, keepdim=True)
    membership = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]], dtype=torch.float64)
    factor = repair_factor(filters, membership)
    signals = torch.randn(100_000, 40, generator=generator, dtype=torch.float64) @ filters[:4].T
    assert float(factor[0] * signals.mean(dim=1).std()) == pytest.approx(1.0, abs=0.01)
    cosine = (filters[:4] @ filters[:4].T).fill_diagonal_(0).sum() / 12
    assert float(factor[0]) == pytest.approx(math.sqrt(4 / (1 + 3 * float(cosine))))
    assert float(factor[1]) == 1.0


def test_fold_ar_keeps_the_mean_and_spread_that_the_batch_norm_stands_for():
    model = randomise_(Plain())
    nn.init.ones_(model.bn1.weight)
    plain, repaired = (pruned(name, model) for name in ("Folding", "Fold-AR"))
    torch.testing.assert_close(plain.bn1.bias, repaired.bn1.bias)
    assert (repaired.bn1.weight.abs() >= plain.bn1.weight.abs() - 1e-6).all()
    torch.testing.assert_close(repaired.bn1.weight.abs(), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_neuron_merging_takes_the_nearest_direction_the_norm_ratio_and_nothing_below_the_threshold():
    filters = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [3.0, 0.1, 0], [0, 0, 1.0]], dtype=torch.float64)
    shifts = torch.zeros(4, 1, dtype=torch.float64)
    columns = merge_into_nearest(filters, shifts, torch.tensor([0, 1]), torch.ones(4, 2, dtype=torch.bool))
    norm = float(filters[2].norm())
    torch.testing.assert_close(columns, torch.tensor([[1, 0], [0, 1], [norm, 0], [0, 0]], dtype=torch.float64))


def test_neuron_merging_prefers_the_nearer_bias_among_equal_directions():
    filters = torch.ones(3, 2, dtype=torch.float64)
    shifts = torch.tensor([[5.0], [1.0], [1.1]], dtype=torch.float64)
    columns = merge_into_nearest(filters, shifts, torch.tensor([0, 1]), torch.ones(3, 2, dtype=torch.bool))
    assert columns[2].tolist() == [0.0, 1.0]


def test_lbyl_is_the_minimum_of_its_three_terms():
    generator = torch.Generator().manual_seed(2)
    filters, shifts = (torch.randn(6, d, generator=generator, dtype=torch.float64) for d in (9, 1))
    kept, (bn, ridge) = torch.tensor([0, 2, 3]), (0.7, 0.3)
    columns = combine(filters, shifts, kept, torch.zeros(6), bn, ridge).numpy()
    f, c = filters.numpy(), shifts.numpy()
    size = np.square(f[kept]).sum(1).mean()
    design = np.concatenate([f[kept].T, math.sqrt(bn) * c[kept].T, math.sqrt(ridge * size) * np.eye(3)])
    for removed in (1, 4, 5):
        target = np.concatenate([f[removed], math.sqrt(bn) * c[removed], np.zeros(3)])
        np.testing.assert_allclose(columns[removed], np.linalg.lstsq(design, target, rcond=None)[0], atol=1e-10)
    assert np.array_equal(columns[kept], np.eye(3))


def test_tuned_lbyl_is_the_candidate_nearest_to_the_dense_network(monkeypatch):
    monkeypatch.setattr(lbyl, "GRID_BN", (0.1,))
    monkeypatch.setattr(lbyl, "GRID_RIDGE", (1e-9, 100.0))
    model, data = duplicated(), images()
    best = lbyl.tuned_lbyl(model, ["conv1"], 0.5, first_channels, torch.zeros(1, 3, 8, 8), images=data)
    torch.testing.assert_close(best(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)


def test_grail_is_the_ridge_regression_of_what_the_consumer_reads():
    model, data = randomise_(Plain()), images()
    merged = pruned("GRAIL", model, data)
    with torch.no_grad():
        h = torch.relu(model.bn1(model.conv1(torch.cat(data)))).movedim(1, -1).flatten(0, 2).double().numpy()
    p = h[:, :4]
    weight = math.sqrt(RIDGE * np.square(p).sum() / 4)
    b = np.linalg.lstsq(np.concatenate([p, weight * np.eye(4)]), np.concatenate([h, np.zeros((4, 8))]), rcond=None)[0]
    wanted = np.einsum("onxy,kn->okxy", model.conv2.weight.detach().double().numpy(), b)
    np.testing.assert_allclose(merged.conv2.weight.detach().numpy(), wanted, atol=1e-5)


def test_grail_reads_uncorrelated_activations_from_themselves_alone():
    kept = torch.tensor([0, 2])
    columns = reconstruct(torch.eye(3, dtype=torch.float64), kept, ridge=0.0)
    torch.testing.assert_close(columns, torch.tensor([[1, 0], [0, 0], [0, 1]], dtype=torch.float64))


@pytest.mark.parametrize("name", ["discard + REPAIR", "paper + REPAIR"])
def test_repair_gives_every_hidden_layer_the_statistics_it_had(name):
    model, data = randomise_(Plain()), images()
    repaired = pruned(name, model, data)
    with torch.no_grad():
        want, have = (_second_layer(net, torch.cat(data)) for net in (model, repaired))
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(have, dim=(0, 2, 3)), statistic(want, dim=(0, 2, 3)), rtol=1e-3, atol=1e-3)


def _second_layer(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net.bn2(net.conv2(torch.relu(net.bn1(net.conv1(x)))))


def test_reestimated_statistics_are_those_of_the_images_and_the_momentum_stays():
    model, data = randomise_(Plain()), images(batches=1)
    reestimate_(model, lambda net, batch: net(batch), data)
    with torch.no_grad():
        z = model.conv1(data[0])
    torch.testing.assert_close(model.bn1.running_mean, z.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, z.var(dim=(0, 2, 3)))
    assert model.bn1.momentum == 0.1
    assert not model.training


@pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")  # other statistics, on a random network
@pytest.mark.parametrize(("name", "like"), [("discard + batch-norm", "selection"), ("GRAIL + batch-norm", "GRAIL")])
def test_reestimation_changes_the_statistics_of_the_method_without_it_and_nothing_else(name, like):
    model, data = randomise_(Plain()), images()
    found, wanted = pruned(name, model, data), pruned(like, model, data if like == "GRAIL" else None)
    reestimate_(wanted, lambda net, batch: net(batch), data)
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")  # other statistics, on a random network
def test_fold_r_keeps_the_spread_of_merged_batch_norms_and_takes_their_statistics_from_the_images():
    model, data = duplicated(), images(batches=1)
    merged = pruned("Fold-R", model, data)
    torch.testing.assert_close(merged.bn1.weight.abs(), model.bn1.weight[:4].abs())
    with torch.no_grad():
        z = merged.conv1(data[0])
    torch.testing.assert_close(merged.bn1.running_mean, z.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(merged.bn1.running_var, z.var(dim=(0, 2, 3)))


@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_cut_nothing_is_changed(name, monkeypatch):
    monkeypatch.setattr(lbyl, "GRID_BN", (1.0,))
    monkeypatch.setattr(lbyl, "GRID_RIDGE", (1.0,))
    model = randomise_(Plain())
    left = METHODS[name].prune(model, ["conv1"], 0.0, l1(), torch.zeros(1, 3, 8, 8), images=images(), seed=0)
    for key, value in model.state_dict().items():
        assert torch.equal(left.state_dict()[key], value), key


def test_discard_is_torch_pruning():
    model = randomise_(Plain())
    ours = METHODS["discard"].prune(model, ["conv1", "conv2"], 0.5, l1(), torch.zeros(1, 3, 8, 8), images=None, seed=0)
    theirs = randomise_(Plain())
    theirs.load_state_dict(model.state_dict())
    ignored = [theirs.fc1, theirs.fc2]
    tp.pruner.BasePruner(theirs, (torch.zeros(1, 3, 8, 8),), l1(), pruning_ratio=0.5, ignored_layers=ignored).step()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_without_roots_only_the_layer_called_last_is_left_alone():
    model = Mlp()
    assert ignored_layers(model, None, torch.zeros(1, 5, 6)) == [model.head]
    with pytest.raises(ValueError, match="named nowhere"):
        ignored_layers(model, ["nowhere"], torch.zeros(1, 5, 6))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not name.endswith("bias")}


@pytest.fixture(scope="module")
def discarded() -> dict[str, dict[str, tuple[int, ...]]]:
    return {case.name: shapes(_prune(METHODS["discard"], case)) for case in PICO}


def _prune(method: Entry, case: Case) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups that can only be cut are named in a warning
        data = images(case.shape) if method.images else None
        return method.prune(case.model(), None, 0.5, l1(), case.example(), images=data, seed=0)


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_every_network_to_the_same_shapes(name, case, discarded, monkeypatch):
    monkeypatch.setattr(lbyl, "GRID_BN", (1.0,))
    monkeypatch.setattr(lbyl, "GRID_RIDGE", (0.1, 1.0))
    model = _prune(METHODS[name], case)
    assert shapes(model) == discarded[case.name]
    with torch.no_grad():
        assert torch.isfinite(model(case.example())).all()
