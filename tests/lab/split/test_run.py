from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intrafusion import cli, load
from intrafusion.lab.errors import LabError, RecipeError
from intrafusion.lab.executors import Failure
from intrafusion.lab.pruning import prune
from intrafusion.lab.recipe.loader import Recipe, read_points, read_recipe
from intrafusion.lab.split import training as split_training
from intrafusion.lab.split.run import SplitRun, run_split
from intrafusion.lab.split.study import Item, network_file, open_results
from intrafusion.lab.sweep import sweep
from intrafusion.lab.weights import digest
from intrafusion.training import loop
from tests.lab.test_sweep import Here

TEXT = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 50, validation: 0.6}
train: {epochs: 2, batch_size: 64}
prune: {ratios: [0.5], ignored: [classifier]}
fusion: paper
finetune: {batch_size: 512}
split: {images: 50}
output: OUT
"""


def one_after_another(work: Callable[[Any], Any], jobs: Sequence[Any], **_: int) -> Iterator[tuple[int, Any]]:
    """Does the jobs here, and lets an interruption through."""
    for number, job in enumerate(jobs):
        yield number, work(job)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_training, "in_processes", one_after_another)


def recipe(folder: Path, *assignments: str) -> Recipe:
    return read_recipe(TEXT, "r", [f"output={folder}", *assignments])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> SplitRun:
    """A run with one epoch, whose networks are trained as they are asked for."""
    folder = tmp_path_factory.mktemp("split")
    return SplitRun(recipe(folder, "train.epochs=1", "split.init=same,different"), progress=False)


def state(run: SplitRun, item: Item) -> dict[str, torch.Tensor]:
    return run.network(item).state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_the_naive_average_is_the_mean_of_the_parts(opened: SplitRun) -> None:
    parts = [state(opened, Item("part", 0, "same", part)) for part in (0, 1)]
    average = state(opened, Item("naive", 0, "same"))
    for key in (name for name in average if not name.endswith("num_batches_tracked")):
        assert torch.allclose(average[key], (parts[0][key] + parts[1][key]) / 2, atol=1e-6)


def test_the_ensemble_averages_probabilities(opened: SplitRun) -> None:
    images = next(iter(opened.networks.bench.data.batches("test", 20)))[0]
    parts = [opened.network(Item("part", 0, "different", part)) for part in (0, 1)]
    with torch.no_grad():
        expected = sum(part(images).softmax(1) for part in parts) / 2
        assert torch.allclose(opened.network(Item("ensemble", 0, "different"))(images), expected, atol=1e-6)


def test_initialisations(opened: SplitRun) -> None:
    same, different = (opened.networks.of_parts(0, init) for init in ("same", "different"))
    assert same[0] == different[0]
    assert len({stage.first for stage in same}) == 1
    assert len({stage.first for seed in (0, 1) for stage in opened.networks.of_parts(seed, "different")}) == 4
    assert opened.networks.of_all(0).first == same[0].first
    assert not equal(state(opened, Item("part", 0, "same", 1)), state(opened, Item("part", 0, "different", 1)))


def test_fusing_and_then_pruning_prunes_the_fused_network(opened: SplitRun) -> None:
    fused = opened.network(Item("aligned repaired", 0, "same"))
    settings, data = opened.recipe.prune, opened.networks.bench.data
    expected = prune(fused, opened.networks.example, settings, opened.recipe.fusion, 0.5, data=data).model
    assert equal(state(opened, Item("fap", 0, "same", None, 0.5)), expected.state_dict())


def test_every_schedule_gives_the_same_widths(opened: SplitRun) -> None:
    methods = (("paf", "same"), ("paf", "different"), ("fap", "same"), ("whole fused", None), ("whole discard", None))
    found = [state(opened, Item(method, 0, init, None, 0.5)) for method, init in methods]
    shapes = [{key: tensor.shape for key, tensor in each.items()} for each in found]
    assert all(each == shapes[0] for each in shapes)
    assert shapes[0] != {key: tensor.shape for key, tensor in state(opened, Item("whole", 0)).items()}


def test_a_network_is_a_copy_of_ones_own(opened: SplitRun) -> None:
    item = Item("naive", 0, "same")
    first = opened.network(item)
    before = copy.deepcopy(first.state_dict())
    for parameter in first.parameters():
        torch.nn.init.zeros_(parameter)
    assert equal(state(opened, item), before)


@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_the_baseline_sees_as_many_images_as_the_parts_together(
    overlap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    update = loop._Run._update

    def counted(self: Any, group: Any) -> float:
        seen.append(sum(len(labels) for _, labels in group))
        return update(self, group)

    monkeypatch.setattr(loop._Run, "_update", counted)
    run = SplitRun(recipe(tmp_path, f"split.overlap={overlap}", "split.parts=3"), progress=False)
    totals = []
    for stages in (run.networks.of_parts(0, "same"), [run.networks.of_all(0)]):
        seen.clear()
        for stage in stages:
            run.networks.network(stage)
        totals.append(sum(seen))
        assert totals[-1] == sum(run.networks.presentations(stage) for stage in stages)
    assert totals[0] == totals[1]
    assert (totals[0] == 2 * len(run.networks.bench.data.split("train"))) == (overlap == 0)


def finished(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(result.item): (result.correct, result.digest) for result in open_results(folder)._results.values()}


def test_a_run_stopped_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("split.budgets=0,2", "split.schedules=paf,whole")
    whole = run_split(recipe(tmp_path / "whole", *settings), progress=False)
    done, stop_at = [0], [0]
    update = loop._Run._update

    def stopping(self: Any, group: Any) -> float:
        done[0] += 1
        if done[0] == stop_at[0]:
            raise KeyboardInterrupt
        return update(self, group)

    monkeypatch.setattr(loop._Run, "_update", stopping)
    interruptions = 0
    while True:
        done[0], stop_at[0] = 0, 7 + interruptions  # in the second epoch of a part, of the whole, of a fine-tuning
        try:
            again = run_split(recipe(tmp_path / "stopped", *settings), progress=False)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 3
    assert again.computed < whole.computed  # what was finished before the last stop was not computed again
    assert finished(tmp_path / "stopped") == finished(tmp_path / "whole")
    assert not list((tmp_path / "stopped").glob("checkpoints/*"))


def test_from_recipe_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(TEXT)
    settings = ("train.epochs=1", "split.seeds=0,1", "split.budgets=0,1", "split.repair=statistics")
    command = ["run", str(tmp_path / "r.yaml"), "--quiet", "--output", str(tmp_path / "o")]
    assert cli.main([*command, *(word for setting in settings for word in ("--set", setting))]) == cli.OK
    printed = capsys.readouterr().out
    for words in ("aligned average, repaired", "PaF", "FaP", "whole, discard", "ensemble of the parts",
                  "sample presentations", "Training on all images at once"):  # fmt: skip
        assert words in printed
    with (tmp_path / "o" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    per_seed = 2 + 1 + 4 + 1 + 2 * 4  # parts, ensemble and averages; whole; pruned at two budgets
    assert len(rows) == 2 * per_seed
    tuned = [row for row in rows if row["epochs"] == "1"]
    assert {row["method"] for row in tuned} == {"paf", "fap", "whole fused", "whole discard"}
    assert all(float(row["finetune_s"]) > 0 and float(row["train_s"]) > 0 for row in tuned)
    report = (tmp_path / "o" / "report.md").read_text()
    assert "| same | FaP | 0.5 | 1 |" in report
    assert report.count("| mean |") == 1 + 2  # a column of the networks, and every setting of the schedules
    page = (tmp_path / "o" / "report.html").read_text()
    assert "Training on all images at once" in page
    assert (tmp_path / "o" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "o" / "report.md").unlink()
    assert cli.main(["report", str(tmp_path / "o")]) == cli.OK
    assert capsys.readouterr().out == printed
    assert (tmp_path / "o" / "report.md").read_text() == report
    again = run_split(recipe(tmp_path / "o", *settings), progress=False)
    assert again.computed == 0


def test_pruned_networks_stay_and_load_anywhere(tmp_path: Path) -> None:
    settings = ("train.epochs=1", "split.budgets=0,1", "split.repair=statistics", "keep=all")
    opened = SplitRun(recipe(tmp_path, *settings), progress=False)
    run_split(opened.recipe, progress=False)
    pruned = [item for item in opened.items if item.ratio]
    assert {item.method for item in pruned} == {"paf", "fap", "whole fused", "whole discard"}
    digests = {result.item: result.digest for result in open_results(tmp_path)._results.values()}
    for item in pruned:
        assert digest(load(network_file(tmp_path, item))) == digests[item]
    (tmp_path / "none").mkdir()
    run_split(recipe(tmp_path / "none", "train.epochs=1", "split.schedules=fap", "keep=none"), progress=False)
    assert not list((tmp_path / "none" / "networks").glob("fap*"))


ON_THE_WAY = ("train.epochs=1", "split.budgets=0,2", "split.repair=statistics", "split.prune_until=0.5",
              "prune.iterative_steps=2", "finetune.batch_size=64")  # fmt: skip


def test_pruning_is_spread_over_the_fine_tuning(tmp_path: Path) -> None:
    run = SplitRun(recipe(tmp_path, *ON_THE_WAY), progress=False)
    tuned = {method: Item(method, 0, init, None, 0.5, 2) for method, init in (
        ("paf", "same"), ("fap", "same"), ("whole fused", None), ("whole discard", None))}  # fmt: skip
    steps = -(-len(run.networks.bench.data.split("train")) // 64)
    assert run.schedules.pruning_steps(tuned["fap"]) == [steps // 2, steps]
    assert [name for name, item in tuned.items() if run.schedules.start(item).ratio] == ["paf"]
    widths = [{key: value.shape for key, value in state(run, item).items()} for item in tuned.values()]
    before = state(run, replace(tuned["paf"], epochs=0))
    assert all(each == {key: value.shape for key, value in before.items()} for each in widths)
    late = ("split.prune_until=0.5", "prune.iterative_steps=999", "split.budgets=1")
    with pytest.raises(RecipeError, match=r"split\.prune_until: 0\.5 of 1 epochs is \d+ steps of the optimizer"):
        SplitRun(recipe(tmp_path / "late", *late), progress=False)


def test_a_run_that_prunes_on_the_way_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = Item("fap", 0, "same", None, 0.5, 2)
    expected = digest(SplitRun(recipe(tmp_path, *ON_THE_WAY), progress=False).network(item))
    run = SplitRun(recipe(tmp_path, *ON_THE_WAY), progress=False)
    run.checkpoint(item).unlink()
    steps = run.schedules.pruning_steps(item)[-1]
    done, update = [0], loop._Run._update

    def stopping(self: Any, group: Any) -> float:
        done[0] += 1
        if done[0] == steps + 2:  # after the last pruning, in the second epoch
            raise KeyboardInterrupt
        return update(self, group)

    monkeypatch.setattr(loop._Run, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.network(item)
    assert run.checkpoint(item).is_file()
    assert digest(SplitRun(recipe(tmp_path, *ON_THE_WAY), progress=False).network(item)) == expected
    assert done[0] == steps + 2 + steps  # the second epoch only


def test_no_repair_is_no_row_of_its_own(tmp_path: Path) -> None:
    run = SplitRun(recipe(tmp_path, "split.repair=none", "split.schedules=fap"), progress=False)
    methods = {item.method for item in run.items}
    assert methods == {"part", "ensemble", "naive", "aligned", "fap"}
    assert all(stage.part is not None for stage in run.networks.stages)


def test_fresh_trains_again(tmp_path: Path) -> None:
    run = SplitRun(recipe(tmp_path, "train.epochs=1"), progress=False)
    assert run.train() == 3
    assert SplitRun(recipe(tmp_path, "train.epochs=1"), progress=False).train() == 0
    assert SplitRun(recipe(tmp_path, "train.epochs=1"), fresh=True, progress=False).train() == 3


def test_a_training_that_fails_is_told_with_its_part(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"seed 0, part 0, first weights 0: training diverged in epoch 1"):
        run_split(recipe(tmp_path, "train.lr=1e30"), progress=False)
    job = split_training.Job(recipe(tmp_path, "train.lr=1e30"), tmp_path, split_training.Stage(0, 1, 0))
    assert isinstance(split_training.train_stage(job), Failure)


def test_too_many_parts(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"class \d has \d+ training images, too few for 1000 parts"):
        SplitRun(recipe(tmp_path, "split.parts=1000"), progress=False)


def test_a_sweep_does_not_split(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="split: not for a sweep"):
        sweep(read_points(TEXT, "r", [f"output={tmp_path}"]), Here(), progress=False)
