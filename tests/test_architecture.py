"""Imports point downwards only, from room to room and from file to file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import intrafusion

PACKAGE = Path(intrafusion.__file__).parent
MAY_IMPORT = {
    "files": set(),
    "models": set(),
    "running": {"running"},
    "ot": {"ot"},
    "groups": {"ot", "running", "groups"},
    "correct": {"ot", "running", "groups", "correct"},
    "history": {"ot", "running", "groups", "correct", "history"},
    "methods": {"ot", "groups", "correct", "methods"},
    "average": {"ot", "running", "groups", "correct", "average"},
    "prune": {"ot", "running", "groups", "correct", "history", "methods", "prune"},
    "checkpoint": {"files", "models", "groups", "checkpoint"},
    "onnx": {"files", "running", "groups", "checkpoint", "onnx"},
    "training": {"files", "groups", "correct", "history", "methods", "prune", "training"},
    "schedule": {"average", "training"},
    "__init__": {"ot", "groups", "methods", "average", "prune", "checkpoint", "onnx", "training"},
    "lab": {
        "files", "models", "running", "ot", "groups", "average", "prune", "checkpoint", "training", "schedule", "lab",
    },
    "cli_parser": {"__init__"},
    "cli": {"prune", "training", "lab", "cli_parser"},
}  # fmt: skip
"""Each room comes after those it may import from; docs/architecture.md says what each is for."""
IN_THE_LAB = {
    "recipe": set(), "data": {"recipe"}, "reports": {"recipe"}, "landscape": {"data", "recipe", "reports"},
    "split": {"data", "recipe", "reports"},
}  # fmt: skip
"""What the lab's folders may import from each other."""
FORBIDDEN_IN_OT = {"torch_pruning", "torchvision", "pathlib", "os"}


def imported(path: Path) -> set[str]:
    """What a file imports anywhere, inside functions and for type checkers too: `module` or `module.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path} imports relatively; name the room")
    return found


def module_of(path: Path) -> str:
    return ".".join(("intrafusion", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
EXPORTED = {
    f"intrafusion.{name.rpartition('.')[2]}": name
    for name in imported(PACKAGE / "__init__.py")
    if name.startswith("intrafusion.")
}
"""Where the names are at home that `intrafusion` looks up when they are first asked for."""


def file_of(name: str) -> str | None:
    """The module of this package that an import reads; a name of `intrafusion` counts as one of its home."""
    name = EXPORTED.get(name, name)
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


def graph() -> dict[str, set[str]]:
    """The files that each file imports.

    `intrafusion/__init__.py` imports none when it is imported: it names the home of each public name for type checkers,
    and looks it up when it is asked for. So it stands for those homes (`EXPORTED`), not for itself. That Python runs a
    folder's `__init__.py` before any file of the folder is no import of the file's either.
    """
    edges = {module: {file for name in imported(path) if (file := file_of(name))} for module, path in FILES.items()}
    return {**edges, "intrafusion": set()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_no_two_files_import_each_other_in_a_circle() -> None:
    sorter = TopologicalSorter(graph())
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"read from right to left, each imports the one before: {' <- '.join(error.args[1])}")


def test_rooms_stand_in_the_order_of_dependence() -> None:
    assert {room(module) for module in FILES} == set(MAY_IMPORT)
    for place, (name, allowed) in enumerate(MAY_IMPORT.items()):
        assert allowed <= set(list(MAY_IMPORT)[: place + 1]), name


def test_the_page_on_the_architecture_has_the_rooms_in_that_order() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(MAY_IMPORT)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_from_the_rooms_below_it(module: str) -> None:
    here, names = room(module), imported(FILES[module])
    rooms = {room(file): name for name in names if (file := file_of(name))}
    assert rooms.keys() <= MAY_IMPORT[here], rooms
    if here == "ot":
        assert not {name.split(".")[0] for name in names} & FORBIDDEN_IN_OT, "ot/ is mathematics only"
    if here in ("lab", "cli"):
        inside = [name for name in names if name.startswith("torch_pruning.dependency")]
        assert not inside, "torch-pruning's insides are touched in groups/ and prune/"


def test_the_folders_of_the_lab_import_in_one_direction() -> None:
    folders = {path.parent.name for path in (PACKAGE / "lab").glob("*/__init__.py")}
    assert folders == set(IN_THE_LAB)
    for module, into in graph().items():
        folder = module.split(".")[2] if module.startswith("intrafusion.lab.") else ""
        if folder in folders:
            used = {file.split(".")[2] for file in into if file.startswith("intrafusion.lab.")} & folders
            assert used <= IN_THE_LAB[folder] | {folder}, module


def test_importing_the_package_prints_and_loads_nothing_it_does_not_need() -> None:
    code = "import sys, intrafusion; print([m for m in ('matplotlib', 'sklearn', 'ot', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_loading_a_network_needs_neither_the_pruner_nor_the_lab() -> None:
    code = "import sys; from intrafusion import load, save; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "intrafusion.checkpoint" in loaded
    assert not loaded & {"torch_pruning", "intrafusion.prune.pruner", "intrafusion.lab", "ot", "sklearn", "torchvision"}


def test_every_public_name_is_there() -> None:
    for name in intrafusion.__all__:
        assert getattr(intrafusion, name) is not None
    assert not hasattr(intrafusion, "no_such_name")
    assert {name.rpartition(".")[2] for name in EXPORTED} == set(intrafusion.__all__)


def test_no_room_hides_a_public_name() -> None:
    """Importing `intrafusion.x.y` makes `intrafusion.x` the folder, whatever it was before."""
    assert not set(intrafusion.__all__) & MAY_IMPORT.keys()
