"""The means of optimised rows."""

from __future__ import annotations

import torch

from intrafusion.ot.rows import bound_means

MEAN = torch.tensor([0.5, -1.0, 8.0]).double()
COV = torch.diag(torch.tensor([1.0, 4.0, 0.25]).double())
EYE = torch.eye(3).double()
NONE = torch.zeros(3).double()


def ratios(rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (rows @ MEAN + shift) / ((rows @ COV) * rows).sum(dim=1).sqrt()


def test_means_near_the_kink_stay_and_far_ones_come_back() -> None:
    rows, shift = 2 * EYE[:2], torch.tensor([130.0, -3.0]).double()
    bounded = bound_means(rows, shift, (EYE[:2], NONE[:2]), MEAN, COV)
    torch.testing.assert_close(ratios(rows, bounded), torch.tensor([3.0, -1.25]).double())
    assert bounded[1] == shift[1]


def test_a_start_that_is_far_may_stay_where_it_was() -> None:
    assert torch.equal(bound_means(EYE, NONE, (EYE, NONE), MEAN, COV), NONE)
    assert ratios(EYE, bound_means(EYE, NONE + 9, (EYE, NONE), MEAN, COV))[2] == 16


def test_rows_without_variance_are_left_alone() -> None:
    shift = torch.tensor([7.0, -1e6, 0.0]).double()
    assert torch.equal(bound_means(0 * EYE, shift, (EYE, NONE), MEAN, COV), shift)
    assert torch.equal(bound_means(EYE, shift, (0 * EYE, NONE), MEAN, COV), shift)
