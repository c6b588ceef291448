# ruff: noqa: E501
from __future__ import annotations

import pytest

from intrafusion.lab.errors import RecipeError
from intrafusion.lab.recipe.nodes import Node, override, parse, parse_assignment


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse(text, "r.yaml")
    return [str(problem) for problem in error.value.problems]


def test_every_value_knows_its_line() -> None:
    tree = parse("a: 1\n# comment\nb:\n  c: [1,\n    2]\n", "r.yaml")
    assert tree.value["a"] == Node(1, "r.yaml:1", "1")
    assert tree.value["b"].where == "r.yaml:3"
    assert [item.where for item in tree.value["b"].value["c"].value] == ["r.yaml:4", "r.yaml:5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("# nothing\n", "r.yaml: the recipe is empty"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML: but found another document"),
        ("a: *b\n", "r.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "r.yaml:4: b.c: given twice; first at r.yaml:3"),
        ("a: !!python/name:os.system ''\n", "r.yaml:1: a: the YAML tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("a: !mine {b: 1}\n", "r.yaml:1: a: the YAML tag !mine is not allowed"),
        ("a: 2024-13-45\n", "r.yaml:1: a: cannot read '2024-13-45': month must be in 1..12, not 13"),
    ],
)  # fmt: skip
def test_broken_yaml(text: str, message: str) -> None:
    assert problems(text) == [message] or (
        "month must be" in message and problems(text) == [message.replace(", not 13", "")]
    )


def test_nothing_is_executed(tmp_path) -> None:
    marker = tmp_path / "marker"
    assert "is not allowed" in problems(f"a: !!python/object/apply:os.mkdir ['{marker}']\n")[0]
    assert not marker.exists()


def test_self_reference_and_multiplying_aliases_end() -> None:
    assert "an alias that contains itself" in problems("a: &x [*x]\n")[0]
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too large for a recipe" in problems("\n".join(lines))[0]


def test_control_characters() -> None:
    assert problems("a: \x00\n")[0].startswith("r.yaml: not valid YAML: unacceptable character")


@pytest.mark.parametrize("argument", ["a", "=1", ".a=1", "a..b=1", "a.=1"])
def test_assignments_need_a_path_and_a_value(argument: str) -> None:
    with pytest.raises(RecipeError, match=r"expected --set section\.key=value"):
        parse_assignment(argument)


def test_assignments_read_yaml_and_fall_back_to_text() -> None:
    assert parse_assignment("a.b=[1, x]")[0] == ["a", "b"]
    assert [item.value for item in parse_assignment("a.b=[1, x]")[1].value] == [1, "x"]
    assert parse_assignment("a=1=2")[1].value == "1=2"
    assert parse_assignment("a=[oops")[1].value == "[oops"
    assert parse_assignment("a=null")[1].value is None
    assert parse_assignment("a=")[1] == Node("", "--set a=", "", True)


def test_override_adds_replaces_and_widens_a_shorthand() -> None:
    tree = parse("a: {b: 1}\nfusion: paper\n", "r.yaml")
    for argument in ("a.b=2", "new.c=3", "fusion.p=2"):
        tree = override(tree, *parse_assignment(argument), {"fusion": "preset"})
    assert tree.value["a"].value["b"].value == 2
    assert tree.value["new"].value["c"].value == 3
    assert {key: node.value for key, node in tree.value["fusion"].value.items()} == {"preset": "paper", "p": 2}
    assert tree.value["fusion"].value["preset"].where == "r.yaml:2"
    with pytest.raises(RecipeError, match=r"'a\.b' is a value, not a section"):
        override(tree, *parse_assignment("a.b.c=2"), {})
