from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafusion.lab.errors import LabError
from intrafusion.lab.weights import digest, load_weights_, read_metadata, save_weights
from intrafusion.models import DigitsCNN


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return DigitsCNN(widths=(4, 4, 4))


@pytest.fixture
def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_what_is_saved_is_what_is_loaded(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "w.safetensors"
    save_weights(model, path, {"note": "hello"})
    torch.manual_seed(1)
    other = DigitsCNN(widths=(4, 4, 4))
    assert digest(other) != digest(model)
    load_weights_(other, path)
    assert digest(other) == digest(model)
    assert read_metadata(path)["note"] == "hello"
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]


def test_half_precision_becomes_float(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    load_weights_(model, tmp_path / "half.safetensors")
    weight = model.get_parameter("features.0.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["features.0.weight"].float())


def test_counters_of_batchnorm_may_be_missing(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.safetensors")
    load_weights_(model, tmp_path / "w.safetensors")


def test_every_mismatch_is_named_and_nothing_is_loaded(
    model: nn.Module, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.safetensors"
    before = digest(model)
    del state["features.0.weight"]
    state["head.weight"] = torch.zeros(1)
    state["classifier.weight"] = torch.zeros(10, 99)
    state["classifier.bias"][0] = float("nan")
    save_file(state, path)
    with pytest.raises(LabError) as error:
        load_weights_(model, path)
    assert str(error.value) == (
        f"{path} does not fit DigitsCNN:\n"
        "  missing from the file: features.0.weight\n"
        "  in the file but not in the network: head.weight\n"
        "  shapes differ: classifier.weight is [10, 99] in the file, [10, 16] in the network\n"
        "  values that are not finite: classifier.bias"
    )
    assert digest(model) == before


def test_missing_and_truncated_files(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(LabError, match=rf"^no weights file at {path}$"):
        load_weights_(model, path)
    save_weights(model, path)
    for size in (0, 5, 100, path.stat().st_size - 1):
        short = tmp_path / "short.safetensors"
        short.write_bytes(path.read_bytes()[:size])
        with pytest.raises(LabError, match=rf"^{short} is truncated or not a safetensors file"):
            load_weights_(model, short)
        assert read_metadata(short) == {}


def test_a_pickle_is_refused(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(LabError, match="not a safetensors file"):
        load_weights_(model, tmp_path / "w.pt")
