# ruff: noqa: E501
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from intrafusion import Fusion, Pair, Plan
from intrafusion.lab.errors import RecipeError, UsageError
from intrafusion.lab.recipe.loader import Recipe, load_recipe, read_recipe, recipe_schema, to_yaml
from intrafusion.lab.recipe.nodes import parse
from intrafusion.lab.recipe.schema import describe, key_of, options

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))
GOOD = """\
model:
  name: digits_cnn
data:
  name: digits
train: {}
prune:
  ratios: [0.5]
output: out
"""


def problems(text: str, *assignments: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        read_recipe(text, "r.yaml", assignments)
    return [str(problem) for problem in error.value.problems]


def test_defaults() -> None:
    recipe = read_recipe(GOOD)
    assert recipe.prune.importance == "l1"
    assert recipe.fusion == Fusion.preset("data-free")
    assert recipe.train is not None
    assert recipe.train.epochs == 10
    assert recipe.places["prune.ratios"] == "recipe:7"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  name: digits\n", "  name: digitz\n", "r.yaml:4: data.name: unknown value 'digitz'; did you mean 'digits'? allowed: digits, cifar10, cifar100, imagenet, image_folder, image_halves, fake"),
        ("ratios: [0.5]", "ratio: [0.5]", "r.yaml:7: prune.ratio: unknown key 'ratio'; did you mean 'ratios'? allowed: ratios, target, overrides, widths, importance, ignored, groups, global, isomorphic, iterative_steps, round_to, images, seed"),
        ("[0.5]", "[0.5, 1.0]", "r.yaml:7: prune.ratios[1]: expected number at least 0 and below 1, got 1"),
        ("[0.5]", "[.nan]", "r.yaml:7: prune.ratios[0]: expected number at least 0 and below 1, got nan"),
        ("[0.5]", "[-0.1]", "r.yaml:7: prune.ratios[0]: expected number at least 0 and below 1, got -0.1"),
        ("[0.5]", "[true]", "r.yaml:7: prune.ratios[0]: expected number at least 0 and below 1, got true"),
        ("[0.5]", "[[0.5]]", "r.yaml:7: prune.ratios[0]: expected number at least 0 and below 1, got a list"),
        ("[0.5]", "[]", "r.yaml:7: prune.ratios: expected at least 1 entry, got an empty list"),
        ("[0.5]", "[0.5, 0.5]", "r.yaml:7: prune.ratios: the same ratio is given twice"),
        ("[0.5]", "0.5", "r.yaml:7: prune.ratios: expected list of numbers at least 0 and below 1, got 0.5"),
        ("[0.5]", "[0.5]\n  round_to: 2.5", "r.yaml:8: prune.round_to: expected whole number at least 1, got 2.5"),
        ("[0.5]", "[0.5]\n  global: 1", "r.yaml:8: prune.global: expected true or false, got 1"),
        ("[0.5]", "[0.5]\n  groups: [all]", "r.yaml:8: prune.groups: expected all | each, got a list"),
        ("[0.5]", "[0.5]\n  ignored: fc", "r.yaml:8: prune.ignored: expected list of texts, got 'fc'"),
        ("[0.5]", "[0.5]\n  widths: [hats]", "r.yaml:8: prune.widths[0]: unknown value 'hats'; did you mean 'heads'? allowed: feed_forward, heads, head_dim, stream, channels"),
        ("[0.5]", "[0.5]\n  widths: [heads, heads]", "r.yaml:8: prune.widths: the same kind is given twice"),
        ("[0.5]", "[0.5]\n  widths: [heads]\n  groups: each", "r.yaml:8: prune.widths: in conflict with groups: each"),
        ("[0.5]", "[0.5]\n  widths: [heads]\n  iterative_steps: 2", "r.yaml:8: prune.widths: in conflict with iterative_steps: heads are cut in one step here"),
        ("[0.5]", "[0.5]\n  seed: null", "r.yaml:8: prune.seed: expected whole number at least 0, got nothing"),
        ("train: {}", "train: {lr: fast}", "r.yaml:5: train.lr: expected number above 0, got 'fast'"),
        ("train: {}", "train: 5", "r.yaml:5: train: expected a section with keys, got 5"),
        ("model:\n  name: digits_cnn\n", "model: 5\n", "r.yaml:1: model: expected a section with keys, got 5"),
        ("model:\n  name: digits_cnn\n", "", "r.yaml:1: model: missing; expected section"),
        ("data:\n  name: digits\n", "data: []\n", "r.yaml:3: data: expected a section with keys, got a list"),
        ("train: {}\n", "", "r.yaml:1: model.weights: missing; give a safetensors file, or add a section 'train'"),
        ("digits_cnn", "7", "r.yaml:2: model.name: expected text, got 7"),
        ("digits_cnn", "digits_cnn\n  weights: no/such.safetensors", "r.yaml:3: model.weights: no such file: no/such.safetensors"),
        ("  name: digits\n", "  name: image_folder\n", "r.yaml:3: data.root: missing; set it with --set data.root=FOLDER (or the path of an archive)"),
        ("  name: digits\n", "  name: digits\n  root: /no/such\n", "r.yaml:5: data.root: '/no/such' does not exist"),
        ("output: out\n", "", "r.yaml:1: output: missing; expected text"),
        ("output: out\n", "output: out\nfusion: papper\n", "r.yaml:9: fusion: unknown preset 'papper'; did you mean 'paper'? allowed: PRESETS"),
        ("output: out\n", "output: out\nfusion: {preset: paper, cost: l3}\n", "r.yaml:9: fusion.cost: unknown value 'l3'; did you mean 'l2'? allowed: COSTS"),
        ("output: out\n", "output: out\nfusion: {merg: paper}\n", "r.yaml:9: fusion.merg: unknown key 'merg'; did you mean 'merge'? allowed: FIELDS"),
        ("output: out\n", "output: out\nfusion: [paper]\n", "r.yaml:9: fusion: expected a preset (PRESETS) or a section"),
        ("output: out\n", "output: out\nfusion: {features: [biases]}\n", "r.yaml:9: fusion: Fusion.features is ('biases',): channels are compared by 'filters' or 'readers' at least"),
        ("output: out\n", "output: out\nfusion: {features: []}\n", "r.yaml:9: fusion: Fusion.features is (): choose from 'filters', 'readers', 'biases', at least one, in a tuple"),
        ("output: out\n", "output: out\nfusion: {features: [filters, filters]}\n", "r.yaml:9: fusion: Fusion.features holds 'filters' twice: choose from 'filters', 'readers', 'biases', each once"),
        ("output: out\n", "output: out\nfusion: {features: [filters, reader]}\n", "r.yaml:9: fusion.features[1]: unknown value 'reader'; did you mean 'readers'? allowed: filters, readers, biases"),
        ("output: out\n", "output: out\nfusion: {features: true}\n", "r.yaml:9: fusion.features: expected list of texts, got true"),
        ("output: out\n", "output: out\nplaces: {}\n", "r.yaml:9: places: unknown key 'places'; allowed: model, data, train, prune, fusion, finetune, split, sweep, output, keep, device, threads"),
    ],
)  # fmt: skip
def test_one_mistake_one_exact_message(old: str, new: str, message: str) -> None:
    from intrafusion.prune.fusion import PRESETS

    assert old in GOOD
    message = message.replace("PRESETS", ", ".join(PRESETS)).replace("COSTS", ", ".join(Fusion.choices()["cost"]))
    message = message.replace("FIELDS", ", ".join(["preset", *(f.name for f in dataclasses.fields(Fusion))]))
    (found,) = problems(GOOD.replace(old, new, 1))
    if "did you mean 'l2'" in message:
        found, message = (text.replace("; did you mean 'l2'?", ";") for text in (found, message))
        found = found.replace("; did you mean 'l1'?", ";")
    assert found.startswith(message)


def test_all_mistakes_at_once() -> None:
    text = GOOD.replace("digits_cnn", "7").replace("0.5", "x").replace("train: {}", "train: {epochs: 0, lrr: 1}")
    found = problems(text, "data.root=/no/such", "prune.sed=1", "fusion.cost=l9", "output=null")
    assert [line.split(": ")[0] for line in found if line.startswith("r.yaml")] == [f"r.yaml:{n}" for n in (2, 5, 5, 7)]
    assert [line.split(": ")[:2] for line in found if line.startswith("--set")] == [
        ["--set data.root=/no/such", "data.root"],
        ["--set prune.sed=1", "prune.sed"],
        ["--set output=null", "output"],
        ["--set fusion.cost=l9", "fusion.cost"],
    ]


def test_the_head_counts() -> None:
    with pytest.raises(RecipeError, match=r"^1 problem in the recipe:\n  r.yaml:7: "):
        read_recipe(GOOD.replace("0.5", "2"), "r.yaml")
    with pytest.raises(RecipeError, match=r"^2 problems in the recipe:\n"):
        read_recipe(GOOD.replace("0.5", "2, 3"), "r.yaml")


def test_not_a_mapping() -> None:
    assert problems("- a\n") == ["r.yaml:1: expected a section with keys, got a list"]
    assert problems("hello\n") == ["r.yaml:1: expected a section with keys, got 'hello'"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the recipe .*No such file"):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UsageError, match=r"cannot read the recipe .*utf-8"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("prune.ratios=0.3,0.6", "prune.ratios", (0.3, 0.6)),
        ("prune.ratios=0.3", "prune.ratios", (0.3,)),
        ("prune.ratios=[0.3, 0.6]", "prune.ratios", (0.3, 0.6)),
        ("prune.ignored=classifier,features.*", "prune.ignored", ("classifier", "features.*")),
        ("prune.global=true", "prune.global_pruning", True),
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.epochs=3", "train.epochs", 3),
        ("train=null", "train", None),
        ("output=007", "output", "007"),
        ("output=1,2", "output", "1,2"),
        ("data.test_images=null", "data.test_images", None),
        ("fusion=barycentre", "fusion", Fusion.preset("barycentre")),
        ("fusion.cost=l2", "fusion", dataclasses.replace(Fusion.preset("paper"), cost="l2")),
        ("fusion={merge: selection}", "fusion", Fusion(merge="selection")),
        (
            "fusion.features=filters,biases",
            "fusion",
            dataclasses.replace(Fusion.preset("paper"), features=("filters", "biases")),
        ),
    ],
)
def test_overrides(assignment: str, path: str, value: Any, tmp_path: Path) -> None:
    text = GOOD + "fusion: paper\n"
    if assignment == "train=null":
        (tmp_path / "w.safetensors").touch()
        text = text.replace("digits_cnn", f"digits_cnn\n  weights: {tmp_path / 'w.safetensors'}")
    found: Any = read_recipe(text, "r.yaml", [assignment])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_weights_are_looked_for_beside_the_images_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "a.tar"
    archive.touch()
    text = GOOD.replace("digits_cnn", "digits_cnn\n  weights: w.safetensors")
    for root in ("data", "data/a.tar"):
        (tmp_path / "w.safetensors").touch()
        (tmp_path / "data" / "w.safetensors").unlink(missing_ok=True)
        assert read_recipe(text, "r", [f"data.root={root}"]).weights_path() == Path("w.safetensors")
        (tmp_path / "data" / "w.safetensors").touch()
        assert read_recipe(text, "r", [f"data.root={root}"]).weights_path() == Path("data/w.safetensors")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    assert read_recipe(GOOD, "r", ["data.root=~/pictures"]).data.root == str(tmp_path / "pictures")


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = read_recipe(GOOD, "r", ["fusion.cost=l2", "prune.ratios=0.1,0.2", "prune.global=true", "data.mean=0.5"])
    assert read_recipe(to_yaml(recipe)) == recipe
    aim = ["prune.ratios=null", "prune.target.macs=0.4", "prune.overrides={features.*: 0.1}", "prune.iterative_steps=3"]
    recipe = read_recipe(GOOD, "r", aim)
    assert recipe.prune.target is not None
    assert recipe.prune.target.goal == ("macs", 0.4)
    assert read_recipe(to_yaml(recipe)) == recipe


def test_shipped_recipes_exist() -> None:
    assert {path.stem for path in RECIPES} >= {
        "digits",
        "digits_finetune",
        "cifar10_resnet20",
        "cifar10_resnet20_finetune",
        "cifar10_resnet20_split",
        "digits_split",
        *(f"{data}_{network}{scope}" for data in ("cifar10", "cifar100") for network in ("resnet18", "vgg11_bn")
          for scope in ("", "_groups")),
        "imagenet_resnet50",
        "imagenet_resnet50_groups",
        "imagenet_efficientnet_lite0",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path, tmp_path: Path) -> None:
    if "timm:" in path.read_text().partition("\ndata:")[0].partition("  name:")[2].splitlines()[0]:
        pytest.importorskip("timm")
    weights = tmp_path / "w.safetensors"
    weights.touch()
    extra = [] if path.stem.startswith("digits") else [f"data.root={tmp_path}"]
    extra += [] if path.stem.startswith("digits") or path.stem.endswith("_split") else [f"model.weights={weights}"]
    recipe = load_recipe(path, extra)
    assert read_recipe(to_yaml(recipe)) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_recipe_is_there_with_its_type_and_default(path: Path) -> None:
    text = path.read_text()
    tree = parse(text, path.name)
    for section in options(Recipe):
        name = key_of(section)
        node = tree.value.get(name)
        kind = {item.name: item for item in options(Recipe)}[name].type
        cls = globals_of_recipe().get(str(kind).removesuffix(" | None"))
        if cls is None or name == "fusion":
            assert comment_above(text, node.where).count("(")
            continue
        if node is None:
            assert name in ("train", "finetune", "split")
            continue
        for item in options(cls):
            entry = node.value[key_of(item)]
            assert f"({describe(cls, item)})" in comment_above(text, entry.where), f"{name}.{key_of(item)}"


def globals_of_recipe() -> dict[str, Any]:
    from intrafusion.lab.recipe import sections

    return {name: value for name, value in vars(sections).items() if name.endswith("Section")}


def comment_above(text: str, where: str) -> str:
    lines = text.splitlines()[: int(where.rsplit(":", 1)[1]) - 1]
    found: list[str] = []
    while lines and lines[-1].lstrip().startswith("#"):
        found.insert(0, lines.pop().strip(" #"))
    return re.sub(r"\s+", " ", " ".join(found))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_json_schema_accepts_every_shipped_recipe(path: Path) -> None:
    assert list(violations(recipe_schema(), yaml.safe_load(path.read_text()))) == []


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("prune.ratio=[0.5]", "prune"),
        ("prune.ratios=[1.0]", "prune.ratios"),
        ("prune.ratios=[]", "prune.ratios"),
        ("prune.groups=some", "prune.groups"),
        ("prune.seed=-1", "prune.seed"),
        ("prune.overrides={a: 2}", "prune.overrides"),
        ("prune.target={macs: 0.0}", "prune.target"),
        ("prune.global=1", "prune.global"),
        ("fusion={cost: l3}", "fusion"),
        ("fusion=papper", "fusion"),
        ("output=null", "output"),
        ("sweep={prune.importance: []}", "sweep"),
        ("sweep=[]", "sweep"),
        ("sweep=l1", "sweep"),
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(assignment: str, path: str) -> None:
    given = yaml.safe_load(GOOD)
    assert list(violations(recipe_schema(), given)) == []
    keys, value = assignment.split("=")
    *section, key = keys.split(".")
    (given[section[0]] if section else given)[key] = yaml.safe_load(value)
    assert list(violations(recipe_schema(), given)) == [path]
    with pytest.raises(RecipeError):
        read_recipe(yaml.safe_dump(given))


def violations(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """The paths at which a value breaks a JSON schema, in the words of the standard that recipes use."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    if not schema:
        return
    if "anyOf" in schema:
        if all(list(violations(choice, value)) for choice in schema["anyOf"]):
            yield path
        return
    if "enum" in schema:
        if value not in schema["enum"]:
            yield path
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number if schema["type"] == "number" else isinstance(value, kinds[schema["type"]])):
        yield path
    elif isinstance(value, dict):
        extra = schema["additionalProperties"]
        if extra is False and (set(value) - set(schema["properties"]) or set(schema.get("required", ())) - set(value)):
            yield path
        for key, child in value.items():
            if below := schema.get("properties", {}).get(key, extra):
                yield from violations(below, child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        if len(value) < schema["minItems"]:
            yield path
        for child in value:
            yield from violations(schema["items"], child, path)
    elif number and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
    ):
        yield path


def halves(plan: Plan) -> Pair:
    columns = 0.5 * plan.coupling / plan.source[:, None]
    return Pair(rows=columns.T.clone(), columns=columns, kept=plan.kept)


def test_a_merge_rule_is_imported_by_name() -> None:
    name = f"{__name__}:halves"
    text = GOOD + f"fusion: {{preset: barycentre, merge: '{name}'}}\n"
    recipe = read_recipe(text, "r.yaml")
    assert recipe.fusion == replace(Fusion.preset("barycentre"), merge=name)
    assert read_recipe(to_yaml(recipe), "again.yaml").fusion == recipe.fusion
    with pytest.raises(RecipeError, match=r"r\.yaml:9: fusion: Fusion\.merge: method '.*:thirds' cannot be imported: "):
        read_recipe(text.replace("halves", "thirds"), "r.yaml")
    with pytest.raises(RecipeError, match=r"fusion\.merge: unknown value 'halves'; did you mean|allowed: "):
        read_recipe(GOOD + "fusion: {merge: halves}\n", "r.yaml")
