"""Small things every lab test needs: a cache of its own, images and recipes made on the spot."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intrafusion.lab.bench import Bench
from intrafusion.lab.recipe.loader import Recipe, read_recipe
from intrafusion.lab.results import Cell, Result
from intrafusion.lab.run import run
from tests.conftest import shorten_timings
from tests.lab.small import TEXT


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("INTRAFUSION_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _short_timing(short_timing: None) -> None: ...


@pytest.fixture
def write_image() -> Callable[..., None]:
    """``write_image(path, seed=0, size=(32, 32))`` saves random pixels."""
    return _write_image


def _write_image(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Two classes, 6 training and 3 test images each."""
    root = tmp_path / "images"
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                _write_image(root / split / name / f"{index:04}.png", seed=100 * label + index + len(split))
    return root


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[..., Path]:
    """``make_archive(folder, prefix)`` packs a folder; ``members`` adds files by name and content."""

    def make(
        folder: Path | None = None, prefix: str = "", members: dict[str, bytes] | None = None, name: str = "a.tar.gz"
    ) -> Path:
        path = tmp_path / "archives" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as tar:
            if folder is not None:
                for child in sorted(folder.iterdir()):
                    tar.add(child, f"{prefix}{child.name}")
            for member, content in (members or {}).items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The smallest one, with a folder of its own."""
    return read_recipe(TEXT, "r.yaml", [f"output={tmp_path / 'out'}"])


@pytest.fixture(scope="session")
def _run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        shorten_timings(patch)
        run(read_recipe(TEXT, "r.yaml", [f"output={folder}"]), progress=False)
    return folder


@pytest.fixture
def finished(recipe: Recipe, _run_once: Path) -> Path:
    """The folder of ``recipe`` as if it had been run: a copy of a run that is made once for all tests."""
    return Path(shutil.copytree(_run_once, recipe.output))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were really computed, in order."""
    done: list[str] = []
    real = Bench.measure

    def measure(self: Bench, cell: Cell) -> Result:
        done.append(f"{cell.method} {cell.ratio} {cell.group}")
        return real(self, cell)

    monkeypatch.setattr(Bench, "measure", measure)
    return done
