"""A run that fine-tunes what it has pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.run import run
from tests.lab.small import TEXT

TUNED = TEXT.replace("[0.25, 0.5]", "[0.5]") + "finetune: {epochs: 2, at: [1], seeds: [0, 1]}\n"


def test_both_networks_of_a_pair_are_fine_tuned_and_reported(tmp_path: Path, measured: list[str]) -> None:
    folder = tmp_path / "out"
    recipe = read_recipe(TUNED, "r.yaml", [f"output={folder}"])
    finished = run(recipe, progress=False)
    assert measured == ["dense 0.0 all"] + ["discard 0.5 all", "fused 0.5 all"] * 3
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["cell"].get("seed") for line in lines] == [None] * 3 + [0, 0, 1, 1]
    assert {line["kept"] for line in lines[1:]} == {lines[1]["kept"]}
    for line in lines[3:]:
        curve = line["curve"]
        assert len(curve["validation"]) == 3
        assert curve["validation"][curve["best"]] == max(curve["validation"])
        assert [epoch for epoch, _ in curve["test"]] == [1]
        assert line["latency"] == []
    assert "after fine-tuning both alike:" in finished.table
    assert (folder / "finetuned.png").exists()
    assert not (folder / "checkpoints").exists()
    measured.clear()
    assert run(recipe, progress=False).table == finished.table
    changed = read_recipe(TUNED, "r.yaml", [f"output={folder}", "finetune.lr=0.02", "finetune.seeds=1"])
    run(changed, progress=False)
    assert measured == ["discard 0.5 all", "fused 0.5 all"]  # what was pruned is not pruned and measured again


def test_an_interrupted_fine_tuning_goes_on_after_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["finetune.seeds=0", "finetune.epochs=3"]
    whole = run(read_recipe(TUNED, "r.yaml", [f"output={tmp_path / 'whole'}", *given]), progress=False).table
    recipe = read_recipe(TUNED, "r.yaml", [f"output={tmp_path / 'cut'}", *given])
    real, passes = Dataset.batches, []

    def batches(self: Dataset, name: str, *args, **kwargs):
        passes.append(name)
        if kwargs.get("generator") is not None and passes.count("train") == 3:
            raise KeyboardInterrupt
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(Dataset, "batches", batches)  # one pass trains the dense network, two more fine-tune
    with pytest.raises(KeyboardInterrupt):
        run(recipe, progress=False)
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1
    passes.clear()
    monkeypatch.setattr(Dataset, "batches", real)
    assert run(recipe, progress=False).table == whole
    assert not (tmp_path / "cut" / "checkpoints").exists()
