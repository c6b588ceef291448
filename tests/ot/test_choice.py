"""Which channels to keep for what is read from them: the picks against explicit least squares, and their symmetries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from intrafusion.ot import choice
from intrafusion.ot.choice import SEARCHES, reconstruction_scores


def covariance(n: int, factors: int, noise: float = 0.0) -> Tensor:
    a = torch.randn(n, factors, dtype=torch.float64)
    return a @ a.T + noise * torch.eye(n, dtype=torch.float64)


def left_over(cov: Tensor, metric: Tensor, kept: list[int]) -> float:
    """tr(M D) by explicit least squares from the kept channels."""
    read = torch.linalg.lstsq(cov[kept][:, kept], cov[kept]).solution
    return float((metric * (cov - cov[:, kept] @ read)).sum())


@pytest.mark.parametrize("readers", [1, 3])
def test_the_picks_are_the_greedy_ones_of_explicit_least_squares(readers):
    n = 9
    covs, metrics = [covariance(n, n + 3) for _ in range(readers)], [covariance(n, 4) for _ in range(readers)]
    scores = reconstruction_scores(covs, metrics)
    kept: list[int] = []
    for _ in range(n):
        errors = {
            j: sum(left_over(c, m, [*kept, j]) for c, m in zip(covs, metrics, strict=True))
            for j in range(n)
            if j not in kept
        }
        kept.append(min(errors, key=errors.__getitem__))
    assert scores.argsort(descending=True).tolist() == kept
    assert scores.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 0.3])
@pytest.mark.parametrize("readers", [1, 3])
def test_backward_drops_are_those_of_explicit_refits(readers, ridge):
    n = 14
    covs, metrics = [covariance(n, n + 3) for _ in range(readers)], [covariance(n, 4) for _ in range(readers)]
    scores = reconstruction_scores(covs, metrics, "backward", ridge)
    ridged = [cov + ridge * torch.diag(cov.diagonal()) for cov in covs]
    kept, dropped = list(range(n)), []
    for _ in range(n - 1):
        errors = {
            j: sum(left_over(c, m, [i for i in kept if i != j]) for c, m in zip(ridged, metrics, strict=True))
            for j in kept
        }
        dropped.append(min(errors, key=errors.__getitem__))
        kept.remove(dropped[-1])
    assert scores.argsort().tolist() == [*dropped, *kept]
    assert scores.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("readers", [1, 2])
def test_blocks_are_chosen_by_explicit_least_squares(readers, search):
    size, blocks = 3, 5
    n = size * blocks
    covs, metrics = [covariance(n, n + 3) for _ in range(readers)], [covariance(n, 4) for _ in range(readers)]
    scores = reconstruction_scores(covs, metrics, search, 1e-9, blocks=blocks)
    assert torch.equal(scores, scores[::size].repeat_interleave(size))
    assert scores.sum().item() == pytest.approx(1.0)

    def error(kept: list[int]) -> float:
        channels = [block * size + i for block in kept for i in range(size)]
        return sum(left_over(cov, metric, channels) for cov, metric in zip(covs, metrics, strict=True))

    order: list[int] = []
    for _ in range(blocks - 1):
        rest = [block for block in range(blocks) if block not in order]
        if search == "forward":
            order.append(min(rest, key=lambda block: error([*order, block])))
        else:
            order.append(min(rest, key=lambda block: error([one for one in rest if one != block])))
    assert scores[::size].argsort(descending=search == "forward").tolist()[:-1] == order


@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_of_one_channel_are_channels(search):
    cov, metric = covariance(12, 20), covariance(12, 4)
    alone, blocks = (reconstruction_scores([cov], [metric], search, blocks=count) for count in (None, 12))
    torch.testing.assert_close(blocks, alone)


@pytest.mark.parametrize("search", SEARCHES)
def test_of_blocks_that_are_rotations_of_each_other_one_is_enough(search):
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    mixing = torch.cat([torch.eye(6, dtype=torch.float64), F.pad(turned, (0, 3))])  # the third is the first one, turned
    cov, metric = covariance(6, 20), covariance(9, 4)
    scores = reconstruction_scores([mixing @ cov @ mixing.T], [metric], search, 1e-9, blocks=3)[::3]
    assert int(scores.argmin()) in (0, 2)
    assert scores.min() < 1e-6 * scores.sum()


def test_blocks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="9 channels are not 4 blocks"):
        reconstruction_scores([covariance(9, 12)], [covariance(9, 4)], blocks=4)


def test_blocks_change_nothing_but_the_time(monkeypatch):
    covs, metrics = [covariance(90, 120), covariance(90, 40)], [covariance(90, 9), covariance(90, 30)]
    whole = reconstruction_scores(covs, metrics, "backward")
    for panel in (1, 7, 64):
        monkeypatch.setattr(choice, "_PANEL", panel)
        got = reconstruction_scores(covs, metrics, "backward")
        assert torch.equal(got.argsort(), whole.argsort())
        torch.testing.assert_close(got, whole, atol=1e-9, rtol=0)


def test_backward_has_the_smaller_error_where_channels_are_of_use_only_together():
    """Two channels whose difference is read: forward starts with others, backward keeps the pair."""
    mix = torch.tensor([[0.1, 10.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 0.05]]).double()
    read = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    cov, metric = mix @ mix.T, read.T @ read
    forward = reconstruction_scores([cov], [metric]).topk(2).indices.tolist()
    backward = reconstruction_scores([cov], [metric], "backward", 1e-9).topk(2).indices.tolist()
    assert sorted(backward) == [0, 1]
    assert left_over(cov, metric, backward) <= left_over(cov, metric, forward) + 1e-12


@pytest.mark.parametrize("search", SEARCHES)
def test_readers_that_see_the_very_same_are_one(search):
    cov, other = covariance(10, 14), covariance(10, 14)
    metrics = [covariance(10, 4) for _ in range(3)]
    one = reconstruction_scores([cov, other, cov], metrics, search)
    apart = reconstruction_scores([cov, other, cov.clone()], metrics, search)
    torch.testing.assert_close(one, apart, atol=1e-10, rtol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_scores_do_not_depend_on_the_order_of_the_channels_or_their_units(search):
    cov, metric, order = covariance(12, 7, 0.1), covariance(12, 5), torch.randperm(12)
    scores = reconstruction_scores([cov], [metric], search)
    unit = torch.rand(12).double() + 0.1
    scaled = reconstruction_scores([cov * unit * unit[:, None]], [metric / unit / unit[:, None]], search)
    torch.testing.assert_close(scaled, scores, atol=1e-10, rtol=0)
    moved = reconstruction_scores([cov[order][:, order]], [metric[order][:, order]], search)
    torch.testing.assert_close(moved, scores[order], atol=1e-10, rtol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_combinations_duplicates_and_constants_come_last(search):
    base = covariance(5, 5, 0.1)
    mix = torch.cat([torch.eye(5), torch.eye(5)[:2], torch.randn(2, 5), torch.zeros(1, 5)]).double()
    scores = reconstruction_scores([mix @ base @ mix.T], [torch.eye(10)], search, 1e-10)
    best = set(scores.topk(5).indices.tolist())
    assert torch.linalg.matrix_rank(mix[sorted(best)]) == 5
    assert (scores.sort().values[:5] < 1e-9).all()
    assert scores.unique().numel() == 10
    assert (scores >= 0).all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cov", [torch.zeros(4, 4), torch.ones(4, 4)], ids=["dead", "equal"])
def test_degenerate_groups_have_different_finite_scores(cov, search):
    for metric in (torch.eye(4), torch.zeros(4, 4)):
        scores = reconstruction_scores([cov], [metric], search)
        assert torch.isfinite(scores).all()
        assert scores.unique().numel() == 4


def test_two_channels_that_are_of_use_only_together_share_what_they_remove():
    """h1 and h0 + h1 nearly cancel in what is read, so the second pick removes far more than the first."""
    mix = torch.tensor([[0.1, 10.0], [0.0, 10.0]]).double()
    read = torch.tensor([[1.0, -1.0]]).double()
    scores = reconstruction_scores([mix @ mix.T], [read.T @ read])
    assert (scores - 0.5).abs().max() < 1e-9
