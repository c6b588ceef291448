"""Fewer channels inside a head: exact where the circuit has that rank, never worse than leaving channels out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intrafusion.ot.circuits import low_rank


def circuit(r, n, m, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(r, size, generator=generator, dtype=torch.float64) for size in (n, m))
    if rank < r:
        a = torch.randn(r, rank, generator=generator, dtype=torch.float64) @ a[:rank]
    return a, b


@given(st.integers(2, 6), st.integers(0, 99))
def test_a_circuit_of_that_rank_is_kept(k, seed):
    a, b = circuit(6, 9, 8, k, seed)
    p, t = low_rank(a @ a.T, b @ b.T, k)
    assert p.shape == t.shape == (k, 6)
    assert torch.allclose((t @ b).T @ (p @ a), b.T @ a, atol=1e-8 * float((b.T @ a).abs().max()))


@given(st.integers(1, 5), st.integers(0, 99))
def test_it_is_the_best_of_that_rank(k, seed):
    a, b = circuit(6, 9, 8, 6, seed)
    p, t = low_rank(a @ a.T, b @ b.T, k)
    error = (b.T @ a - (t @ b).T @ (p @ a)).norm()
    left = torch.linalg.svdvals(b.T @ a)[k:].square().sum().sqrt()
    assert error == pytest.approx(float(left), rel=1e-6)
    for kept in torch.combinations(torch.arange(6), k):
        assert error <= (b.T @ a - b[kept].T @ a[kept]).norm() + 1e-9


def test_inputs_weigh_the_circuit():
    a, b = circuit(4, 5, 6, 4, 0)
    inputs = torch.randn(5, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[2:] *= 0.01
    seen = a @ inputs
    p, t = low_rank(seen @ seen.T, b @ b.T, 2)
    plain = low_rank(a @ a.T, b @ b.T, 2)
    errors = [(b.T @ seen - (t @ b).T @ (p @ seen)).norm() for p, t in ((p, t), plain)]
    assert errors[0] < 0.5 * errors[1]


def test_what_means_nothing_is_refused():
    moments = torch.eye(3)
    with pytest.raises(ValueError, match="4 of 3"):
        low_rank(moments, moments, 4)
    with pytest.raises(ValueError, match="not finite"):
        low_rank(moments * float("nan"), moments, 2)


def test_heads_that_give_nothing_are_no_error():
    p, t = low_rank(torch.zeros(3, 3), torch.eye(3), 2)
    assert torch.isfinite(p).all()
    assert torch.isfinite(t).all()
