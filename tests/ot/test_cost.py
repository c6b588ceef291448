"""Distances against scipy, whole or in parts, in either precision; and what distances are measured to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from intrafusion.ot import cost as cost_module
from intrafusion.ot import normalise_rows, pairwise_cost
from intrafusion.ot.parts import BLOCK, Rows
from intrafusion.ot.targets import representatives

SCIPY = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}
WIDE = BLOCK + 37


def features(n, d=7, seed=0, dtype=torch.float64):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


@pytest.mark.parametrize("kind", SCIPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_cost_what_the_whole_matrix_costs(kind, dtype):
    x, y = features(9, WIDE, dtype=dtype), features(5, WIDE, seed=1, dtype=dtype)
    widths = [3, 0, 600, WIDE - 603]
    parts = pairwise_cost(list(x.split(widths, dim=1)), list(y.split(widths, dim=1)), kind)
    assert torch.equal(parts, pairwise_cost(x, y, kind))
    exact = torch.from_numpy(cdist(x.double(), y.double(), SCIPY[kind]))
    assert torch.allclose(parts, exact, rtol=1e-12 if dtype == torch.float64 else 2e-6)


@given(
    kind=st.sampled_from(sorted(SCIPY)), wide=st.booleans(), threads=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_exact_duplicates_are_at_distance_nought_and_as_far_from_all_others(kind, wide, threads, seed):
    x = features(90, WIDE if wide else 5, seed, torch.float32)
    twin, of = torch.arange(0, 90, 3), torch.arange(1, 90, 3)
    x[twin] = x[of]
    torch.set_num_threads(threads)
    try:
        cost = pairwise_cost(x, x, kind)
        cross = pairwise_cost(x[twin], x[of], kind)
    finally:
        torch.set_num_threads(1)
    assert (cost[twin, of] == 0).all()
    assert (cost.diagonal() == 0).all()
    assert (cross.diagonal() == 0).all()
    assert torch.equal(cost[twin], cost[of])
    assert torch.equal(cost[:, twin], cost[:, of])


def test_several_threads_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(cost_module, "_ALONE", 0)
    monkeypatch.setattr(cost_module, "_SHARE", 7)
    x, y = features(31, WIDE, dtype=torch.float32), features(70, WIDE, seed=1, dtype=torch.float32)
    one = pairwise_cost(x, y)
    torch.set_num_threads(2)
    try:
        assert torch.equal(pairwise_cost(x, y), one)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_rows_that_only_look_alike_are_not_taken_for_equal(monkeypatch):
    x = features(6, dtype=torch.float32)
    exact = pairwise_cost(x, x, "l2")
    first = cost_module._first
    monkeypatch.setattr(cost_module, "_first", lambda values: first(values if values.dim() == 1 else values * 0))
    assert torch.allclose(pairwise_cost(x, x, "l2"), exact, atol=2e-3)  # rounding of |a|² + |b|² - 2 a·b is all


def test_a_row_that_is_not_finite_is_named_with_its_side():
    x, y = features(4), features(3, seed=1)
    for kind in SCIPY:
        for bad in (float("nan"), float("inf"), float("-inf")):
            broken = y.clone()
            broken[1, 2] = bad
            with pytest.raises(ValueError, match="features of target 1 are not finite"):
                pairwise_cost(x, broken, kind)
            with pytest.raises(ValueError, match="features of channel 1 are not finite"):
                pairwise_cost(broken, x, kind)


def test_rows_are_views_until_a_block_of_them_is_read():
    weight = features(8, 20, dtype=torch.float32)
    rows = Rows.of([weight[:, :15], weight[:, 15:]])
    assert rows.parts[0].data_ptr() == weight.data_ptr()
    taken = rows.normalised().take(torch.tensor([5, 2])).take(torch.tensor([1]))
    assert torch.allclose(taken.dense(), torch.nn.functional.normalize(weight[2:3]))
    assert torch.equal(rows.dense(), weight)
    assert [block.shape[1] for block in rows.blocks(8)] == [8, 8, 4]


@pytest.mark.parametrize("parts", [[], [torch.ones(3, 2), torch.ones(4, 2)]])
def test_parts_need_one_row_per_channel_each(parts):
    with pytest.raises(ValueError, match="one row per channel each"):
        Rows.of(parts)


def test_only_taken_rows_are_normalised():
    x = features(5, dtype=torch.float32)
    x[0] = float("nan")
    found = Rows.of(x).take(torch.tensor([3, 1])).normalised().dense()
    assert torch.allclose(found, torch.nn.functional.normalize(x[[3, 1]]))


@pytest.mark.parametrize("kind", ["kmeans", "gmm"])
def test_cluster_centres_are_the_means_of_well_separated_clusters(kind):
    centres = 10 * torch.eye(4, 12, dtype=torch.float64)
    x = centres.repeat_interleave(5, dim=0) + 0.01 * features(20, 12)
    found = representatives(x, torch.tensor([0, 5, 10, 15]), kind).dense()
    assert torch.allclose(found, x.reshape(4, 5, 12).mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["kmeans", "gmm"])
def test_duplicates_and_zero_rows_do_not_break_the_clustering(kind):
    x = features(3).repeat_interleave(4, dim=0)
    x[8:] = 0
    found = representatives(x, torch.tensor([0, 1, 8, 9]), kind).dense()
    assert torch.isfinite(found).all()


def test_clusters_do_not_depend_on_the_seed_when_they_start_from_the_kept_channels():
    x, kept = features(30, 40), torch.arange(0, 30, 3)
    found = [representatives(x, kept, "kmeans", seed=seed).dense() for seed in (0, 5)]
    assert torch.equal(*found)
