"""Training in parts, on networks and functions of one's own."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import intrafusion
from intrafusion import schedule

LABELS = torch.arange(60) % 3
IMAGES = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + LABELS[:, None]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(model: nn.Module, indices: Tensor, checkpoint: Path) -> None:
    with (checkpoint.parent / f"trained-{int(indices[0])}").open("a") as file:
        file.write("once\n")
    order = indices[torch.randperm(len(indices))]
    batches = [(IMAGES[rows], LABELS[rows]) for rows in order.split(10)]
    intrafusion.finetune(model, batches, epochs=2, lr=0.05, checkpoint=checkpoint, progress=False)


def fit_but_fail_on_the_second(model: nn.Module, indices: Tensor, checkpoint: Path) -> None:
    if 0 in indices:
        fit(model, indices, checkpoint)
    elif os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ZeroDivisionError("no luck")


def halve(model: Any) -> None:
    pruner = intrafusion.IntraFusionPruner(
        model, IMAGES[:2], lambda group: torch.arange(8.0), pruning_ratio=0.5, ignored_layers=[model[2]], fusion="paper"
    )
    pruner.step()


def equal(first: nn.Module, second: nn.Module) -> bool:
    state = second.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def runs(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("trained-*"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.integers(0, 5))
def test_strata_are_disjoint_complete_and_balanced(labels: list[int], share: float, seed: int) -> None:
    tensor = torch.tensor(labels)
    rest, taken = schedule.stratified(tensor, share, seed=seed)
    assert sorted([*rest.tolist(), *taken.tolist()]) == list(range(len(labels)))
    for value in set(labels):
        assert int((tensor[taken] == value).sum()) == round(share * labels.count(value))
    again = schedule.stratified(tensor, share, seed=seed)
    assert torch.equal(again[1], taken)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=80), st.integers(2, 4), st.integers(0, 5))
def test_parts_are_disjoint_complete_seeded_and_have_every_class(labels: list[int], count: int, seed: int) -> None:
    labels += [0, 1, 2, 3] * count
    tensor = torch.tensor(labels)
    parts = schedule.split(tensor, count, seed=seed)
    assert len(parts) == count
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert torch.equal(part, part.sort().values)
        for value in range(4):
            assert abs(int((tensor[part] == value).sum()) - labels.count(value) / count) <= 1
    again = schedule.split(labels, count, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_another_seed_divides_otherwise() -> None:
    labels = torch.arange(200) % 10
    first, second = schedule.split(labels, 2, seed=0), schedule.split(labels, 2, seed=1)
    assert not torch.equal(first[0], second[0])


@settings(deadline=None)
@given(st.floats(0.0, 1.0), st.integers(2, 4))
def test_overlapping_parts_have_a_share_of_the_others(overlap: float, count: int) -> None:
    labels = torch.arange(240) % 3
    own, shared = (schedule.split(labels, count, overlap=share, seed=3) for share in (0.0, overlap))
    for before, after in zip(own, shared, strict=True):
        assert set(before.tolist()) <= set(after.tolist())
        assert len(set(after.tolist())) == len(after)
        for value in range(3):
            others = 80 - int((labels[before] == value).sum())
            added = int((labels[after] == value).sum()) - int((labels[before] == value).sum())
            assert added == round(overlap * others)


def test_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="class 2 has 1 training images, too few for 2 parts"):
        schedule.split([0, 0, 1, 1, 2], 2)
    with pytest.raises(ValueError, match=r"overlap is 1\.5"):
        schedule.split(LABELS, 2, overlap=1.5)


def test_parts_are_trained_once_in_processes_of_their_own(tmp_path: Path) -> None:
    parts, start = schedule.split(LABELS, 2), network()
    before = copy.deepcopy(start)
    first = schedule.train(fit, start, parts, tmp_path, threads=1)
    assert runs(tmp_path) == 2
    assert equal(start, before)
    assert not equal(first[0], first[1])
    again = schedule.train(fit, start, parts, tmp_path, threads=1)
    assert runs(tmp_path) == 2
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not list(tmp_path.glob("*.checkpoint"))
    alone = schedule.train(fit, [network(), network()], parts, tmp_path / "alone", workers=1, threads=1)
    assert all(equal(a, b) for a, b in zip(first, alone, strict=True))  # one after the other or at once is the same


@pytest.mark.parametrize(
    ("killed", "message"), [("", r"part 1: ZeroDivisionError: no luck"), ("1", r"part 1: .* killed \(SIGKILL\)")]
)
def test_a_failure_names_its_part_and_the_finished_ones_are_kept(
    killed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILLED", killed)
    parts = schedule.split(LABELS, 2)
    first = next(number for number, part in enumerate(parts) if 0 in part)
    parts = [parts[first], parts[1 - first]]
    with pytest.raises(schedule.TrainingError, match=message) as error:
        schedule.train(fit_but_fail_on_the_second, network(), parts, tmp_path, workers=1, threads=1)
    assert error.value.part == 1
    assert [path.name[:7] for path in tmp_path.glob("*.pt")] == ["part-0-"]


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 networks for 2 parts"):
        schedule.train(fit, [network()] * 3, schedule.split(LABELS, 2), tmp_path)
    with pytest.raises(ValueError, match="define functions and classes at the top of a module"):
        schedule.train(lambda *_: None, network(), schedule.split(LABELS, 2), tmp_path)


def test_pruning_and_fusing_copies_of_one_network_is_pruning_it() -> None:
    dense = network()
    pruned = copy.deepcopy(dense)
    halve(pruned)
    before = copy.deepcopy(dense)
    for schedule_ in (schedule.prune_and_fuse, schedule.fuse_and_prune):
        found = schedule_([dense, copy.deepcopy(dense)], halve, IMAGES[:2])
        assert found[0].out_features == 4  # type: ignore[union-attr]
        assert torch.allclose(found(IMAGES), pruned(IMAGES), atol=1e-5)
    assert equal(dense, before)


def test_each_network_can_have_its_own_pruning() -> None:
    seen = []
    models = [network(0), network(1)]
    prunes = [lambda model, n=n: seen.append((n, equal(model, models[n]))) for n in (0, 1)]
    schedule.prune_and_fuse(models, prunes, IMAGES[:2])
    assert seen == [(0, True), (1, True)]
    with pytest.raises(ValueError, match="1 pruning functions for 2 networks"):
        schedule.prune_and_fuse(models, prunes[:1], IMAGES[:2])
