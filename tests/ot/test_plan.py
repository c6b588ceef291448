"""Transport: oracles (scipy), conservation, and what happens when there is nothing to transport."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from intrafusion.ot import PlanStatus, pairwise_cost, solve, transport_plan
from intrafusion.ot.cost import normalise_rows


def features(n, d=7, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_programme(cost, a, b) -> float:
    n, k = cost.shape
    rows = np.kron(np.eye(n), np.ones(k))
    columns = np.kron(np.ones(n), np.eye(k))
    result = linprog(cost.flatten(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]))
    return float(result.fun)


@given(n=st.integers(2, 9), k=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_cost_is_that_of_the_linear_programme(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, k, dtype=torch.float64, generator=generator)
    a, b = torch.rand(n, generator=generator) + 0.01, torch.rand(k, generator=generator) + 0.01
    coupling, paid = solve(cost, a, b)
    a, b = (m.double() / m.double().sum() for m in (a, b))
    assert paid == pytest.approx(linear_programme(cost.numpy(), a.numpy(), b.numpy()), abs=1e-9)
    assert torch.allclose(coupling.sum(1), a, atol=1e-9)
    assert torch.allclose(coupling.sum(0), b, atol=1e-9)
    assert (coupling >= 0).all()


def test_two_to_one_with_uniform_masses_is_an_assignment():
    x = features(20)
    kept = torch.arange(0, 20, 2)
    plan = transport_plan(x, kept)
    unit = normalise_rows(x)
    cost = pairwise_cost(unit, unit[kept]).numpy()
    rows, columns = linear_sum_assignment(np.repeat(cost, 2, axis=1))
    assert plan.cost == pytest.approx(cost[rows, columns // 2].mean())


@pytest.mark.parametrize("target", ["uniform", "importance", "free"])
@pytest.mark.parametrize("source", ["uniform", "importance"])
@pytest.mark.parametrize("targets", ["kept", "kmeans", "gmm"])
def test_mass_is_conserved_class_by_class(source, target, targets):
    n, kept = 24, torch.tensor([0, 1, 5, 9, 12, 13, 20, 22])
    classes = (torch.arange(n) >= 12).long()
    importance = torch.rand(n, generator=torch.Generator().manual_seed(3)) + 0.1
    plan = transport_plan(
        features(n),
        kept,
        classes=classes,
        importance=importance,
        source_mass=source,
        target_mass=target,
        targets=targets,
    )
    want = torch.full((n,), 1 / n).double() if source == "uniform" else importance.double() / importance.double().sum()
    assert torch.allclose(plan.source, want, atol=1e-9)
    assert float(plan.coupling.sum()) == pytest.approx(1.0, abs=1e-9)
    across = classes[:, None] != classes[kept][None, :]
    assert float(plan.coupling[across].sum()) == 0.0
    if target == "uniform":
        for label in (0, 1):
            inside = plan.target[classes[kept] == label]
            assert torch.allclose(inside, inside.mean(), atol=1e-9)
    if target == "free":
        assert plan.status is PlanStatus.NEAREST
        assert ((plan.coupling > 0).sum(1) == 1).all()
        assert (plan.coupling[kept, torch.arange(len(kept))] > 0).all()


def test_free_targets_cost_no_more_than_any_fixed_ones():
    x, kept = features(30), torch.arange(0, 30, 3)
    free = transport_plan(x, kept, target_mass="free").cost
    assert free <= transport_plan(x, kept).cost + 1e-12


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
def test_a_partial_plan_takes_only_what_is_nearer_to_a_kept_channel_than_to_zero(cost):
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    like_a, unlike_both, opposite = 2 * a + 0.1 * b, torch.ones(6, dtype=torch.float64) - a - b, -a - b
    x = torch.stack([a, b, like_a, unlike_both, 3 * b, opposite])
    plan = transport_plan(x, torch.tensor([0, 1]), cost=cost, target_mass="partial")
    assert plan.stranded.tolist() == [False, False, False, True, False, True]
    assert plan.coupling.argmax(dim=1)[[0, 1, 2, 4]].tolist() == [0, 1, 0, 1]
    assert float(plan.coupling.sum()) == pytest.approx(1.0)
    unit = normalise_rows(x)
    near = pairwise_cost(unit, unit[:2], cost).amin(dim=1)
    assert plan.cost == pytest.approx(float(near[[0, 1, 2, 4]].mean()))


def test_keeping_everything_is_the_identity():
    plan = transport_plan(features(6), torch.arange(6))
    assert plan.is_identity
    assert torch.equal(plan.coupling, torch.eye(6, dtype=torch.float64) / 6)
    assert plan.cost == 0.0
    assert "stays where it is" in plan.status.value


def test_channels_of_a_class_without_a_kept_one_are_stranded_not_mixed():
    classes = torch.tensor([0, 0, 1, 1])
    plan = transport_plan(features(4), torch.tensor([0]), classes=classes)
    assert plan.stranded.tolist() == [False, False, True, True]
    assert float(plan.coupling[2:].sum()) == 0.0
    assert float(plan.coupling.sum()) == pytest.approx(1.0)


def test_zero_importance_still_carries_a_little_mass():
    importance = torch.tensor([1.0, 0.0, 2.0, 0.0])
    plan = transport_plan(
        features(4), torch.tensor([0, 1]), importance=importance, source_mass="importance", target_mass="importance"
    )
    assert (plan.source > 0).all()
    assert (plan.target > 0).all()


def test_duplicates_travel_together():
    x = features(4).repeat_interleave(2, dim=0)
    plan = transport_plan(x, torch.tensor([0, 2, 4, 6]))
    assert plan.cost == pytest.approx(0.0, abs=1e-12)
    assert torch.equal((plan.coupling > 0).double(), torch.eye(4, dtype=torch.float64).repeat_interleave(2, dim=0))


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_plan_follows_a_permutation_of_the_channels(seed):
    x, kept = features(12, seed=seed), torch.tensor([1, 4, 6, 9])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    where = torch.argsort(order)[kept]
    moved, at = where.sort()
    plan, permuted = transport_plan(x, kept), transport_plan(x[order], moved)
    assert torch.allclose(plan.coupling[order][:, at], permuted.coupling, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source_mass": "heavy"}, "unknown source mass 'heavy': choose one of uniform, importance"),
        ({"target_mass": "heavy"}, "unknown target mass"),
        ({"targets": "mean"}, "unknown targets 'mean'"),
        ({"cost": "l3"}, "unknown cost 'l3'"),
        ({"source_mass": "importance"}, "the metric gave none"),
        ({"source_mass": "importance", "importance": torch.ones(3)}, "3 entries for 5 channels"),
        ({"source_mass": "importance", "importance": torch.tensor([1, 1, -1, 1, 1])}, "masses are negative"),
        ({"source_mass": "importance", "importance": torch.zeros(5)}, "masses are all zero"),
        ({"source_mass": "importance", "importance": torch.full((5,), float("nan"))}, "masses are not finite"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        transport_plan(features(5), torch.tensor([0, 1]), **kwargs)


def test_features_that_are_not_finite_are_named():
    x = features(5)
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match="features of channel 3 are not finite"):
        transport_plan(x, torch.tensor([0, 1]))


def test_a_cost_that_is_not_finite_is_refused_before_the_solver_sees_it():
    cost = torch.rand(3, 2)
    cost[1, 1] = float("nan")
    with pytest.raises(ValueError, match="transport cost is not finite"):
        solve(cost, torch.ones(3), torch.ones(2))


def test_a_solver_that_gives_up_is_an_error(monkeypatch):
    import ot

    def gives_up(a, b, cost, numItermax, log):
        return np.zeros_like(cost), {"result_code": 3, "warning": "numItermax reached", "cost": 0.0}

    monkeypatch.setattr(ot, "emd", gives_up)
    with pytest.raises(RuntimeError, match="stopped early: numItermax reached"):
        solve(torch.rand(3, 2), torch.ones(3), torch.ones(2))


def test_a_solver_that_loses_mass_is_an_error(monkeypatch):
    import ot

    monkeypatch.setattr(ot, "emd", lambda a, b, cost, **_: (np.zeros_like(cost), {"result_code": 1, "cost": 0.0}))
    with pytest.raises(RuntimeError, match="loses mass"):
        solve(torch.rand(3, 2), torch.ones(3), torch.ones(2))


@given(n=st.integers(2, 9), seed=st.integers(0, 99), target_mass=st.sampled_from(["uniform", "free", "partial"]))
@settings(max_examples=30, deadline=None)
def test_main_targets_name_kept_channels_and_a_channel_stays_with_itself(n, seed, target_mass):
    kept = torch.arange(0, n, 2)
    plan = transport_plan(features(n, seed=seed), kept, target_mass=target_mass)
    assert len(plan.main_targets) == n
    for channel, (target, share) in enumerate(plan.main_targets):
        assert (target == -1 and share == 0) == bool(plan.stranded[channel])
        assert target in [-1, *kept.tolist()]
        assert 0 <= share <= 1
        if channel in kept:
            assert (target, share) == (channel, 1.0)


@given(n=st.integers(3, 12), seed=st.integers(0, 99), cost=st.sampled_from(["l1", "l2", "cosine"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_stays_at_home_leaves_the_plan_optimal(n, seed, cost, data):
    x, importance = features(n, seed=seed), torch.rand(n, generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))))
    masses = {name: data.draw(st.sampled_from(["uniform", "importance"])) for name in ("source_mass", "target_mass")}
    plan = transport_plan(x, kept, cost=cost, importance=importance, **masses)
    unit = normalise_rows(x)
    whole, best = solve(pairwise_cost(unit, unit[kept], cost), plan.source, plan.target)
    assert plan.cost == pytest.approx(best, abs=1e-9)
    assert torch.allclose(plan.source, whole.sum(dim=1), atol=1e-9)
    assert torch.allclose(plan.target, whole.sum(dim=0), atol=1e-9)


def test_parts_in_single_precision_give_the_plan_of_the_whole_in_double():
    x, kept = features(24, d=300), torch.arange(0, 24, 3)
    whole = transport_plan(x.float().double(), kept)
    parts = transport_plan(list(x.float().split([1, 99, 200], dim=1)), kept)
    assert torch.allclose(parts.coupling, whole.coupling, atol=1e-12)
    assert parts.cost == pytest.approx(whole.cost, rel=1e-6)


@given(n=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_assignment_costs_what_the_network_simplex_would(n, seed):
    import ot

    cost = torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mass = np.full(n, 1 / n)
    coupling, paid = solve(cost, torch.ones(n), torch.ones(n))
    assert paid == pytest.approx(ot.emd2(mass, mass, cost.numpy()), abs=1e-12)
    assert paid == pytest.approx(float((coupling * cost).sum()), abs=1e-12)
    assert torch.allclose(coupling.sum(dim=0), torch.from_numpy(mass))
    assert torch.allclose(coupling.sum(dim=1), torch.from_numpy(mass))
