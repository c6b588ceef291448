"""Distances against scipy, merge rules against their definitions."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import cdist

from intrafusion.ot import MERGE_RULES, Pair, merge_rule, normalise_rows, pairwise_cost, selection_pair, transport_plan
from intrafusion.ot.targets import representatives

SCIPY = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}


def features(n, d=7, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SCIPY)
def test_costs_are_scipys(kind):
    x, y = features(6), features(4, seed=1)
    assert torch.allclose(pairwise_cost(x, y, kind), torch.from_numpy(cdist(x, y, SCIPY[kind])))


@pytest.mark.parametrize("kind", SCIPY)
def test_identical_rows_cost_nothing_and_zero_rows_cost_no_nan(kind):
    x = features(5)
    x[2] = x[4] = 0
    cost = pairwise_cost(x, x, kind)
    assert torch.isfinite(cost).all()
    assert cost.diagonal().abs().max().item() < 1e-7
    assert cost[2, 4] == 0


def test_normalised_rows_have_norm_one_or_zero_at_any_scale():
    x = features(4)
    x[1] *= 1e-200
    x[2] *= 1e200
    x[3] = 0
    assert torch.allclose(normalise_rows(x).norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    assert normalise_rows(x[:, :0]).shape == (4, 0)


def plan(n=9, k=4):
    return transport_plan(features(n), torch.arange(k))


def test_the_paper_rule_gives_every_source_coefficients_that_sum_to_one_on_both_sides():
    pair = MERGE_RULES["paper"](plan())
    assert torch.allclose(pair.columns.sum(dim=1), torch.ones(9).double())
    assert torch.equal(pair.rows, pair.columns.T)


def test_the_barycentre_averages_rows_and_sums_columns():
    pair = MERGE_RULES["barycentre"](plan())
    assert torch.allclose(pair.rows.sum(dim=1), torch.ones(4).double())
    assert torch.allclose(pair.columns.sum(dim=1), torch.ones(9).double())
    assert torch.allclose(pair.rows @ torch.ones(9).double(), torch.ones(4).double())


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_rule_is_the_identity_when_all_channels_stay(rule):
    pair = MERGE_RULES[rule](transport_plan(features(5), torch.arange(5)))
    assert torch.equal(pair.rows, torch.eye(5, dtype=torch.float64))
    assert pair.is_selection


def test_a_linear_network_of_duplicates_is_exact_under_the_barycentre():
    rows, columns = features(3).repeat_interleave(3, dim=0), features(2, 9, seed=1)
    pair = MERGE_RULES["barycentre"](transport_plan(rows, torch.tensor([0, 3, 6])))
    assert torch.allclose((columns @ pair.columns) @ (pair.rows @ rows), columns @ rows)


def test_a_selection_is_recognised_and_a_merge_is_not():
    chosen = selection_pair(torch.tensor([1, 3]), 4)
    assert chosen.is_selection
    assert not MERGE_RULES["paper"](plan()).is_selection


def test_a_new_rule_is_one_function_and_a_name_can_be_taken_only_once():
    @merge_rule("halves")
    def halves(p) -> Pair:
        chosen = selection_pair(p.kept, len(p.coupling))
        return Pair(chosen.rows / 2, chosen.columns * 2, p.kept)

    try:
        from intrafusion import Fusion

        assert Fusion(merge="halves").merge == "halves"
        with pytest.raises(ValueError, match="a merge rule named 'halves' exists already"):
            merge_rule("halves")(halves)
    finally:
        del MERGE_RULES["halves"]


@pytest.mark.parametrize("kind", ["kmeans", "gmm"])
def test_cluster_centres_are_the_means_of_well_separated_clusters(kind):
    centres = 10 * torch.eye(4, 12, dtype=torch.float64)
    x = centres.repeat_interleave(5, dim=0) + 0.01 * features(20, 12)
    found = representatives(x, torch.tensor([0, 5, 10, 15]), kind)
    assert torch.allclose(found, x.reshape(4, 5, 12).mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["kmeans", "gmm"])
def test_duplicates_and_zero_rows_do_not_break_the_clustering(kind):
    x = features(3).repeat_interleave(4, dim=0)
    x[8:] = 0
    found = representatives(x, torch.tensor([0, 1, 8, 9]), kind)
    assert torch.isfinite(found).all()


def test_clusters_do_not_depend_on_the_seed_when_they_start_from_the_kept_channels():
    x, kept = features(30, 40), torch.arange(0, 30, 3)
    assert torch.equal(representatives(x, kept, "kmeans", seed=0), representatives(x, kept, "kmeans", seed=5))
