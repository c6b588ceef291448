"""The three rooms: imports point downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import intrafusion

PACKAGE = Path(intrafusion.__file__).parent
MAY_IMPORT = {
    "files": set(),
    "running": set(),
    "ot": {"ot"},
    "groups": {"ot", "running", "groups"},
    "correct": {"ot", "running", "groups", "correct"},
    "history": {"ot", "groups", "correct", "history"},
    "average": {"ot", "running", "groups", "correct", "average"},
    "prune": {"ot", "running", "groups", "correct", "history", "prune"},
    "checkpoint": {"checkpoint", "files", "groups"},
    "export": {"checkpoint", "export", "files", "groups"},
    "training": {"files", "groups", "correct", "history", "prune", "training"},
    "schedule": {"average", "training"},
    "__init__": {"average", "checkpoint", "export", "groups", "prune", "training"},
    "lab": {
        "ot", "running", "groups", "files", "average", "prune", "checkpoint", "training", "schedule", "lab",
        "intrafusion",
    },
    "cli": {"cli_parser", "lab", "training", "intrafusion"},
    "cli_parser": {"intrafusion"},
}  # fmt: skip
IN_THE_LAB = {
    "recipe": set(), "data": {"recipe"}, "reports": {"recipe"}, "landscape": {"data", "recipe", "reports"},
    "split": {"data", "recipe", "reports"},
}  # fmt: skip
"""What the lab's folders may import from each other."""
FROM_ABOVE = {"checkpoint": {"intrafusion.lab.models.build_model", "intrafusion.lab.errors.LabError"}}
"""Looked up inside a function, by name: a checkpoint says which of the lab's networks it belongs to."""
FORBIDDEN_IN_OT = {"torch_pruning", "torchvision", "pathlib", "os"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path} imports relatively; name the room")
    return found


def room(module: str) -> str:
    parts = module.split(".")
    known = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists())
    return parts[1] if known else "intrafusion"


def test_every_module_imports_only_from_the_rooms_below_it():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert here in MAY_IMPORT, f"{path} is in no known room"
        for name in imports(path):
            if name.split(".")[0] == "intrafusion" and name not in FROM_ABOVE.get(here, ()):
                assert room(name) in MAY_IMPORT[here], f"{path} imports {name}"
            if here == "ot":
                assert name.split(".")[0] not in FORBIDDEN_IN_OT, f"{path} imports {name}: ot/ is mathematics only"
            if here in ("lab", "cli"):
                assert not name.startswith("torch_pruning.dependency"), f"{path} touches torch-pruning's insides"


def test_the_folders_of_the_lab_do_not_import_each_other_in_circles():
    folders = {path.parent.name for path in (PACKAGE / "lab").glob("*/__init__.py")}
    assert folders == set(IN_THE_LAB)
    for folder in folders:
        for path in (PACKAGE / "lab" / folder).glob("*.py"):
            into = {name.split(".")[2] for name in imports(path) if name.startswith("intrafusion.lab.")} & folders
            assert into <= IN_THE_LAB[folder] | {folder}, path


def test_importing_the_package_prints_and_loads_nothing_it_does_not_need():
    code = "import sys, intrafusion; print([m for m in ('matplotlib', 'sklearn', 'ot', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_loading_a_network_needs_neither_the_pruner_nor_the_lab():
    code = "import sys; from intrafusion import load, save; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "intrafusion.checkpoint" in loaded
    assert not loaded & {"torch_pruning", "intrafusion.prune.pruner", "intrafusion.lab", "ot", "sklearn", "torchvision"}


def test_every_public_name_is_there():
    for name in intrafusion.__all__:
        assert getattr(intrafusion, name) is not None
    assert not hasattr(intrafusion, "no_such_name")
