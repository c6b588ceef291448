"""The networks of recipes and their layers."""

from __future__ import annotations

import sys
import types

import pytest
from torch import nn

from intrafusion.lab.errors import LabError
from intrafusion.lab.models import build_model, find_layers


def test_a_factory_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("someones_networks")
    module.make = lambda num_classes: nn.Linear(4, num_classes)  # type: ignore[attr-defined]
    module.broken = lambda num_classes: 1 / 0  # type: ignore[attr-defined]
    module.text = lambda num_classes: "no"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "someones_networks", module)
    assert build_model("someones_networks:make", num_classes=5).out_features == 5
    with pytest.raises(LabError, match="the call with num_classes=10 failed: division by zero"):
        build_model("someones_networks:broken")
    with pytest.raises(LabError, match=r"returned a str, not an nn\.Module"):
        build_model("someones_networks:text")
    with pytest.raises(LabError, match="module 'someones_networks' has no 'other'"):
        build_model("someones_networks:other")
    with pytest.raises(LabError, match=r"cannot import 'no_such_package'.*PYTHONPATH"):
        build_model("no_such_package:make")


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(
        LabError, match=r"'cifar_resnet21'; did you mean 'cifar_resnet\d+'\? Known: .*, package\.module:factory$"
    ):
        build_model("cifar_resnet21")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_what_a_library_lacks_is_a_mistake_of_the_recipe(library: str) -> None:
    pytest.importorskip(library)
    with pytest.raises(LabError, match=r"has no network 'resnet19'; did you mean '\w+'\?$"):
        build_model(f"{library}:resnet19")


def test_layers_are_found_by_pattern() -> None:
    model = build_model("cifar_resnet20")
    assert list(find_layers(model, "layer1.*.conv2")) == [f"layer1.{i}.conv2" for i in range(3)]
    with pytest.raises(LabError, match=r"^'layer1.conv2' matches no layer; closest: layer\d\.\d\.conv2, "):
        find_layers(model, "layer1.conv2")
