"""Merge rules against their definitions."""

from __future__ import annotations

import pytest
import torch

from intrafusion.ot import selection_pair, transport_plan
from intrafusion.ot.merge import barycentre, paper, selection


def features(n, d=7, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plan(n=9, k=4):
    return transport_plan(features(n), torch.arange(k))


def test_the_paper_rule_gives_every_source_coefficients_that_sum_to_one_on_both_sides():
    pair = paper(plan())
    assert torch.allclose(pair.columns.sum(dim=1), torch.ones(9).double())
    assert torch.equal(pair.rows, pair.columns.T)


def test_the_barycentre_averages_rows_and_sums_columns():
    pair = barycentre(plan())
    assert torch.allclose(pair.rows.sum(dim=1), torch.ones(4).double())
    assert torch.allclose(pair.columns.sum(dim=1), torch.ones(9).double())
    assert torch.allclose(pair.rows @ torch.ones(9).double(), torch.ones(4).double())


@pytest.mark.parametrize("rule", [selection, paper, barycentre])
def test_every_rule_is_the_identity_when_all_channels_stay(rule):
    pair = rule(transport_plan(features(5), torch.arange(5)))
    assert torch.equal(pair.rows, torch.eye(5, dtype=torch.float64))
    assert pair.is_selection


def test_a_linear_network_of_duplicates_is_exact_under_the_barycentre():
    rows, columns = features(3).repeat_interleave(3, dim=0), features(2, 9, seed=1)
    pair = barycentre(transport_plan(rows, torch.tensor([0, 3, 6])))
    assert torch.allclose((columns @ pair.columns) @ (pair.rows @ rows), columns @ rows)


def test_a_selection_is_recognised_and_a_merge_is_not():
    chosen = selection_pair(torch.tensor([1, 3]), 4)
    assert chosen.is_selection
    assert not paper(plan()).is_selection
