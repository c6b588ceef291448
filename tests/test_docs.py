"""What the README and the pages of docs/ say can be followed: snippets run, and what they name exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
from intrafusion.methods import METHODS
from intrafusion.models import DigitsCNN

ROOT = Path(intrafusion.__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SMALLER = {
    "torchvision:resnet50": "digits_cnn",
    "num_classes=1000": "num_classes=10",
    "torch.randn(1, 3, 224, 224)": "torch.randn(1, 1, 8, 8)",
    "model.fc": "model.classifier",
    "epochs=10": "epochs=1",
    "epochs=5": "epochs=1",
}
"""What makes a snippet run in seconds, on the network that it is given here."""
AGAIN = "# model, optimizer, pruner and schedule made as at the start of training\n"
"""Where a snippet says this, the page's first one is run again on new objects."""
FILE = re.compile(r"# (\w+)\.py\n")
"""A snippet that begins so is a file beside the reader's other ones, importable from there."""
RECIPE = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 100}
train: {epochs: 1}
prune: {ratios: [0.5], ignored: [classifier]}
fusion: paper
output: out
"""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> list[str]:
    text = read(page)
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def given() -> dict[str, Any]:
    """What a reader has before the first snippet of a page."""
    torch.manual_seed(0)
    model, images = DigitsCNN(), torch.randn(64, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(64) % 10), batch_size=32)
    small = {name: DigitsCNN() for name in ("pruned", "dense", "a", "b", "c")}
    return {
        "intrafusion": intrafusion, "torch": torch, "MyNetwork": DigitsCNN, "path": "state.pt", **small,
        "model": model, "ema": torch.optim.swa_utils.AveragedModel(model),
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "metric": tp.importance.GroupMagnitudeImportance(p=1), "example": images[:1], "example_inputs": images[:1],
        "batches": [images], "unlabelled": [images], "loader": loader, "train_loader": loader,
        "held_out_loader": loader,
    }  # fmt: skip


@pytest.fixture
def registry() -> Iterator[None]:
    """Pages register methods, and a name can be taken once."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_the_snippets_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    intrafusion.save(DigitsCNN(), "mine.safetensors")
    names, found = given(), snippets(page)
    for number, snippet in enumerate(found, start=1):
        if file := FILE.match(snippet):
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.delitem(sys.modules, file[1], raising=False)
            (tmp_path / f"{file[1]}.py").write_text(snippet)
        before, again, after = snippet.partition(AGAIN)
        exec(compile(before, f"{page}, snippet {number}", "exec"), names)
        if again:
            names |= given()
            exec(found[0] + after, names)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = read(page)
    links = [(ROOT / page).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    paths = [ROOT / path.rstrip(".") for path in re.findall(r"\b(?:benchmarks|docs|examples|tests)/[\w./-]+", text)]
    recipes = re.findall(r"intrafusion(?:\.cli)? (?:run|sweep|inspect) ([a-z]\w+)", text)
    files = [*links, *paths, *(ROOT / "recipes" / f"{name}.yaml" for name in recipes)]
    assert [str(path) for path in files if not path.exists()] == []
    modules = re.findall(r"python -m ([\w.]+\w)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
