from __future__ import annotations

from pathlib import Path

import pytest

from intrafusion.lab import bench as bench_module
from intrafusion.lab import measure
from intrafusion.lab.bench import Bench
from intrafusion.lab.errors import RecipeError
from intrafusion.lab.measure import count_macs, count_parameters
from intrafusion.lab.pruning import prune
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.results import Cell, key_of_identity
from intrafusion.lab.target import UnreachableTarget, find_ratio

TEXT = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 100}
train: {epochs: 1, batch_size: 128}
prune: {target: {macs: 0.5}, ignored: [classifier]}
fusion: barycentre
output: OUT
threads: 1
"""


@pytest.mark.parametrize("wanted", [0.02, 0.3, 0.5, 0.97])
def test_the_ratio_of_a_smooth_network(wanted: float) -> None:
    assert (1 - find_ratio(lambda ratio: (1 - ratio) ** 2, wanted)) ** 2 == pytest.approx(wanted, rel=0.02)


def test_coarse_channels_are_an_error() -> None:
    with pytest.raises(UnreachableTarget, match=r"0\.6 cannot be met within 2%: the nearest is 0\.5000, at ratio 0\.5"):
        find_ratio(lambda ratio: 1.0 if ratio < 0.5 else 0.5, 0.6)


@pytest.mark.parametrize(
    ("target", "extra"),
    [
        ("macs: 0.49", []),
        ("parameters: 0.35", ["prune.global=true", "prune.importance=taylor", "prune.images=50"]),
        ("macs: 0.6", ["prune.overrides={features.3: 0.1}", "prune.importance=chip"]),
        ("macs: 0.4", ["prune.iterative_steps=2"]),
    ],
)
def test_the_fused_network_meets_the_target(tmp_path: Path, target: str, extra: list[str]) -> None:
    recipe = read_recipe(
        TEXT, "r.yaml", [f"output={tmp_path}", f"prune.target={{{target}}}", "prune.images=20", *extra]
    )
    bench = Bench(recipe, tmp_path, progress=False)
    _, discard, fused = bench.cells()
    assert discard.ratio == fused.ratio
    pruned = prune(bench.dense, bench.example, recipe.prune, recipe.fusion, fused.ratio, data=bench.data)
    count = count_parameters if "parameters" in target else lambda model: count_macs(model, bench.example)
    assert count(pruned.model) / count(bench.dense) == pytest.approx(float(target.split()[1]), rel=0.02)
    assert "target" not in bench.identity(fused)["prune"]


def test_a_target_out_of_reach_names_its_key(tmp_path: Path) -> None:
    recipe = read_recipe(TEXT, "r.yaml", [f"output={tmp_path}", "prune.round_to=32"])
    with pytest.raises(RecipeError, match=r"r\.yaml:4: prune\.target\.macs: 0\.5 cannot be met within 2%"):
        Bench(recipe, tmp_path, progress=False).cells()


def test_the_identity_of_a_cell_has_every_setting_it_depends_on(tmp_path: Path) -> None:
    cell = Cell("fused", 0.5, "all")

    def identity(*assignments: str) -> dict:
        recipe = read_recipe(TEXT, "r.yaml", [f"output={tmp_path}", "prune.global=true", *assignments])
        return Bench(recipe, tmp_path, progress=False, trained=False).identity(cell)

    changes = [
        "prune.overrides={features.0: 0.1}", "prune.overrides={features.0: 0.2}", "prune.iterative_steps=2",
        "prune.isomorphic=true", "prune.importance=chip", "prune.importance=reconstruction", "prune.images=20",
    ]  # fmt: skip
    plain = [identity("prune.target={parameters: 0.4}", "prune.iterative_steps=1"), identity()]
    found = [identity("prune.target=null", "prune.ratios=0.5", change) for change in changes]
    assert plain[0] == plain[1]
    assert len({key_of_identity(entry) for entry in [*found, plain[0]]}) == len(changes) + 1
    assert ["train" in entry for entry in found] == ["chip" in c or "construction" in c for c in changes]


def test_a_latency_is_met_and_its_ratio_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency here is the MACs, with a drift from one look to the next as on a real machine."""
    looks = []

    def timed(model, dense, example, batch: int) -> float:
        looks.append(batch)
        return count_macs(model, example) / count_macs(dense, example) * (1 + 0.002 * len(looks))

    monkeypatch.setattr(bench_module, "latency_share", timed)
    recipe = read_recipe(TEXT.replace("{macs: 0.5}", "{latency: 0.5, batch: 8}"), "r.yaml", [f"output={tmp_path}"])
    first = Bench(recipe, tmp_path, progress=False).cells()
    assert set(looks) == {8}
    count = len(looks)
    assert Bench(recipe, tmp_path, progress=False).cells() == first
    assert len(looks) == count
    bench = Bench(recipe, tmp_path, progress=False)
    pruned = bench.prune(first[2], recipe.prune, recipe.fusion)
    left = count_macs(pruned.model, bench.example) / count_macs(bench.dense, bench.example)
    assert left == pytest.approx(0.5, rel=0.05)
    other = read_recipe(TEXT.replace("{macs: 0.5}", "{latency: 0.7, batch: 8}"), "r.yaml", [f"output={tmp_path}"])
    assert Bench(other, tmp_path, progress=False).cells()[1].ratio < first[1].ratio


def test_a_share_of_the_latency_is_that_of_both_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 4.0, 2.0, 5.0, 9.0, 8.0])
    monkeypatch.setattr(measure, "measure_latency", lambda *_: measure.Latency(1, next(times), 0.0, "", 1))
    assert measure.latency_share(None, None, None, 1) == 0.5  # type: ignore[arg-type]
