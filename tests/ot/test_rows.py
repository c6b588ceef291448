"""The means of optimised rows."""

from __future__ import annotations

import torch

from intrafusion.ot.rows import Samples, _View, bound_means, read_back, read_copies

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


def test_the_error_and_its_gradient_are_those_of_the_plain_formula() -> None:
    """The residual of the regression under the metric, differentiated by autograd with the regression held fixed."""
    generator = torch.Generator().manual_seed(0)
    z, reads = torch.randn(400, 6, generator=generator), torch.randn(6, 9, generator=generator)
    z[:, 3] += 5
    samples = Samples(z, torch.relu(z), torch.relu, reads @ reads.T / 6, torch.arange(400) % 4 == 3)
    rows = torch.randn(3, 6, generator=generator, requires_grad=True)
    shift = torch.randn(3, generator=generator, requires_grad=True)
    view = _View(samples)
    loss = view.loss(rows, shift)
    found = torch.autograd.grad(loss, (rows, shift))

    fitted = ~samples.held_out
    new, h = torch.relu(z[fitted] @ rows.T + shift), samples.h[fitted]
    about = (new - new.mean(dim=0)).detach().double()
    gram = about.T @ about
    gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
    read = torch.linalg.solve(gram, about.T @ (h - h.mean(dim=0)).double()).T.float()
    error = h - h.mean(dim=0) - (new - new.mean(dim=0)) @ read.T
    plain = ((error @ samples.metric) * error).sum() / len(h)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(found, torch.autograd.grad(plain, (rows, shift)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        judged = samples.held_out
        left = samples.h[judged] - h.mean(dim=0) - (torch.relu(z[judged] @ rows.T + shift) - new.mean(dim=0)) @ read.T
        torch.testing.assert_close(
            torch.tensor(view.held_out_error(rows, shift)), ((left @ samples.metric) * left).sum() / int(judged.sum())
        )


def test_what_has_no_shift_gets_none_however_far_its_mean_is():
    mean, cov = torch.tensor([50.0, -80.0, 0.1]).double(), torch.eye(3).double()
    rows, start = torch.eye(3).double()[:2], (0.5 * torch.eye(3).double()[:2], torch.zeros(2).double())
    assert torch.equal(bound_means(rows, torch.zeros(2).double(), start, mean, cov), torch.zeros(2).double())
    moved = bound_means(rows, torch.tensor([100.0, -100.0]).double(), start, mean, cov)
    torch.testing.assert_close(rows @ mean + moved, torch.tensor([50.0, -80.0]).double())


def test_copies_are_read_exactly():
    """The ridge of least squares would leave a thousandth."""
    torch.manual_seed(0)
    z = torch.randn(400, 6) @ torch.randn(6, 6) + 3
    z = torch.cat([z, z], dim=1)
    held_out = torch.arange(400) % 4 == 3
    reader = Samples(z, torch.relu(z), torch.relu, torch.eye(12), held_out)
    rows = torch.eye(12).double()[:6]
    read = read_back(rows, torch.zeros(6).double(), [reader])
    torch.testing.assert_close(read, torch.cat([torch.eye(6), torch.eye(6)]).double(), atol=1e-5, rtol=0)
    other = torch.rand(12, 6).double()
    assert torch.equal(read_back(rows, torch.zeros(6).double(), [reader], other), read)  # it does worse


def test_copies_that_a_plan_has_mistaken_are_read_from_what_they_copy() -> None:
    """Of 6 channels 0, 2, 4 stay; 1 copies 0, 3 copies 2, and 5 is nobody's copy; the plan took 3 for a copy of 4."""
    h = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    h[:, 1], h[:, 3] = h[:, 0], h[:, 2]
    reader = Samples(h, h, torch.relu, torch.eye(6), torch.arange(50) % 4 == 3)
    planned = torch.eye(3)[torch.tensor([0, 0, 1, 2, 2, 1])].double()
    planned[5] /= 2
    found = read_copies(planned, torch.tensor([0, 2, 4]), [reader])
    expected = planned.clone()
    expected[3] = torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(found, expected)
    other = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))  # to another reader they are different
    assert torch.equal(
        read_copies(planned, torch.tensor([0, 2, 4]), [reader, Samples(other, other, *reader_of(reader))]), planned
    )
    dead = Samples(0 * h, 0 * h, *reader_of(reader))
    assert torch.equal(read_copies(planned, torch.tensor([0, 2, 4]), [dead]), planned)


def reader_of(samples: Samples) -> tuple:
    return samples.f, samples.metric, samples.held_out
