from __future__ import annotations

import pytest

from intrafusion.lab.errors import RecipeError
from intrafusion.lab.recipe.grid import combinations, parse_grid, value_text
from intrafusion.lab.recipe.loader import read_points, read_recipe, to_yaml

GOOD = """\
model: {name: digits_cnn}
data: {name: digits}
train: {epochs: 1}
prune: {ratios: [0.5]}
output: out
"""


def test_a_grid_is_every_combination_in_order() -> None:
    (grid,) = parse_grid(["prune.importance=l1,l2", "prune.ratios=[0.3],[0.5, 0.7]"])
    shown = [{key: value_text(node) for key, node in point.items()} for point in combinations([grid])]
    assert shown == [
        {"prune.importance": "l1", "prune.ratios": "[0.3]"},
        {"prune.importance": "l1", "prune.ratios": "[0.5, 0.7]"},
        {"prune.importance": "l2", "prune.ratios": "[0.3]"},
        {"prune.importance": "l2", "prune.ratios": "[0.5, 0.7]"},
    ]


def test_points_of_the_command_line() -> None:
    points = read_points(GOOD, grids=parse_grid(["fusion={preset: paper, seed: 2},data-free", "prune.seed=0,1"]))
    assert [point.recipe.prune.seed for point in points] == [0, 1, 0, 1]
    assert [point.recipe.fusion.seed for point in points] == [2, 2, 0, 0]
    assert points[0].settings == {"fusion": "{preset: paper, seed: 2}", "prune.seed": "0"}
    assert all(point.recipe.sweep is None for point in points)


def test_points_of_the_section() -> None:
    text = GOOD + "sweep:\n- prune.importance: [l1]\n- {prune.importance: [l1, lamp], prune.ratios: [[0.3]]}\n"
    points = read_points(text)
    assert [(p.recipe.prune.importance, p.recipe.prune.ratios) for p in points] == [
        ("l1", (0.5,)), ("l1", (0.3,)), ("lamp", (0.3,)),
    ]  # fmt: skip
    assert len(read_points(text, grids=parse_grid(["prune.seed=1,2"]))) == 2
    recipe = read_recipe(text)
    assert recipe.sweep is not None
    assert read_recipe(to_yaml(recipe)).sweep == recipe.sweep


def test_without_a_grid_there_is_one_point() -> None:
    (point,) = read_points(GOOD, "r", ["prune.seed=7"])
    assert (point.settings, point.recipe) == ({}, read_recipe(GOOD, "r", ["prune.seed=7"]))


def test_equal_points_are_run_once() -> None:
    text = GOOD + "sweep: [{prune.seed: [0, 1]}, {prune.seed: [1, 2]}]\n"
    assert [point.recipe.prune.seed for point in read_points(text)] == [0, 1, 2]


def test_an_assignment_below_a_varied_key_is_kept_or_replaced_as_written() -> None:
    points = read_points(GOOD, "r", ["fusion.seed=2"], parse_grid(["fusion.cost=l1,l2"]))
    assert [(point.recipe.fusion.seed, point.recipe.fusion.cost) for point in points] == [(2, "l1"), (2, "l2")]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["prune.seed"], ["--grid prune.seed: expected --grid section.key=value,value"]),
        (["=1", "a..b=1"], ["--grid =1: expected", "--grid a..b=1: expected"]),
        (["prune.seed="], ["--grid prune.seed=: prune.seed: expected at least 1 value, got an empty list"]),
        (["prune.seed=1,1"], ["prune.seed: the value 1 is given twice"]),
        (["prune.seed=1", "prune.seed=2"], ["prune.seed: given twice"]),
        (["output=a,b"], ["'output' belongs to the whole sweep"]),
        (["sweep=a,b", "threads=1,2"], ["'sweep' belongs", "'threads' belongs"]),
        (["prune.seed={a"], ["prune.seed: expected a list of values"]),
    ],
)
def test_grids_that_are_none(arguments: list[str], messages: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        parse_grid(arguments)
    assert len(error.value.problems) == len(messages)
    for problem, message in zip(error.value.problems, messages, strict=True):
        assert message in str(problem)


def test_every_problem_of_every_point_is_told_once() -> None:
    with pytest.raises(RecipeError) as error:
        read_points(GOOD, "r.yaml", ["prune.images=0"], parse_grid(["prune.importance=l1,l3", "prune.sead=1,2"]))
    texts = [str(problem).split(";")[0] for problem in error.value.problems]
    assert texts == [
        "--set prune.images=0: prune.images: expected whole number at least 1, got 0",
        "--grid prune.sead=1,2: prune.sead: unknown key 'sead'",
        "--grid prune.importance=l1,l3: prune.importance: unknown value 'l3'",
    ]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("l1", "r:6: sweep: expected keys with lists of values"),
        ("{}", "r:6: sweep: expected keys with lists of values"),
        ("{prune.seed: 3}", "r:6: sweep.prune.seed: expected a list of values"),
        ("[{prune.seed: [1]}, {data: []}]", "r:6: sweep[1].data: expected at least 1 value"),
        ("{output: [a]}", "r:6: sweep.output: 'output' belongs to the whole sweep"),
    ],
)
def test_a_broken_section_is_refused_by_run_and_by_sweep(section: str, problem: str) -> None:
    for read in (read_recipe, read_points):
        with pytest.raises(RecipeError) as error:
            read(f"{GOOD}sweep: {section}\n", "r")
        assert str(error.value.problems[0]).startswith(problem)
