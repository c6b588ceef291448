"""A file that does not fit is named and explained, and the model is as it was before."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import intrafusion
from intrafusion import CheckpointError
from intrafusion.checkpoint import container, restore
from tests.checkpoint.forgery import forge, parts
from tests.checkpoint.networks import CASES, dense, pruned, same, state


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pruned.safetensors"
    intrafusion.save(pruned("plain"), path)
    return path


def refused(path, model: nn.Module, *words: str) -> str:
    before = state(model)
    with pytest.raises(CheckpointError) as error:
        intrafusion.load(path, model)
    assert same(state(model), before)
    message = str(error.value)
    assert str(path) in message
    for word in words:
        assert word in message
    return message


def edited(path, change) -> None:
    """The file with its document changed and its checksum put right."""
    header, document, data = parts(path.read_bytes())
    change(document, header)
    path.write_bytes(forge(header, document, data))


def test_an_untouched_forgery_is_the_file(path):
    before = path.read_bytes()
    edited(path, lambda document, header: None)
    assert path.read_bytes() == before
    intrafusion.load(path, dense("plain"))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, dense("plain"), "no complete safetensors file")


def test_one_flipped_bit_of_a_weight(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    refused(path, dense("plain"), "checksum", "changed or damaged")


def test_weights_that_swap_their_names(path):
    content = path.read_bytes()
    assert content.count(b'"bn1.bias":{') == content.count(b'"bn1.weight":{') == 1
    swapped = content.replace(b'"bn1.bias":{', b'"_":{').replace(b'"bn1.weight":{', b'"bn1.bias":{')
    path.write_bytes(swapped.replace(b'"_":{', b'"bn1.weight":{'))
    refused(path, dense("plain"), "checksum")


def test_a_foreign_safetensors_file_and_a_pickle(path):
    save_file(dense("plain").state_dict(), path)
    refused(path, dense("plain"), "intrafusion.save did not write it")
    save_file(dense("plain").state_dict(), path, metadata={"intrafusion": "{}"})
    refused(path, dense("plain"), "not that of an intrafusion checkpoint")
    torch.save(dense("plain").state_dict(), path)
    refused(path, dense("plain"), "no complete safetensors file")


def test_a_newer_format_is_said_before_anything_else(path):
    edited(path, lambda document, header: document.update(version=2, modules="something new"))
    refused(path, dense("plain"), "version 2", "newer intrafusion")


def test_a_file_that_is_not_there(tmp_path):
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=str(wrong)):
            intrafusion.load(wrong, dense("plain"))


def test_another_architecture_is_named_by_its_modules(path):
    message = refused(path, dense("residual"), "Residual", "modules only in the file", "modules only in the model")
    assert "'conv1'" in message
    assert "and 4 more" in message


def test_a_layer_of_another_kind(path):
    model = dense("plain")
    model.bn3 = nn.LayerNorm(10)
    refused(path, model, "'bn3'", "'BatchNorm1d' in the file, 'LayerNorm' in the model")


def test_a_network_that_is_smaller_than_the_saved_one(path):
    model = dense("plain")
    model.fc2 = nn.Linear(10, 3)
    refused(path, model, "'fc2.weight' is [4, 5] in the file, [3, 10] in the model")


def test_a_stride_that_no_pruning_changes(path):
    model = dense("plain")
    model.conv2.stride = (2, 2)
    refused(path, model, "'conv2': stride is (1, 1) in the file, (2, 2) in the model")


def test_whole_and_floating_numbers_are_not_exchanged(path):
    model = dense("plain")
    model.bn1.num_batches_tracked = torch.zeros(())
    refused(path, model, "'bn1.num_batches_tracked' is int64 in the file, float32")


def attribute(module: str, **values):
    return lambda document: document["modules"][module]["attributes"].update(values)


def tensor(name: str, **values):
    return lambda document: document["tensors"][name].update(values)


def tie(alias: str, name: str):
    return lambda document: (document["tensors"].pop(alias, None), document["tied"].update({alias: name}))


EDITS = {
    "a size that its tensors contradict": (attribute("conv1", out_channels=3), "its sizes ask for [3, 3, 3, 3]"),
    "no groups": (attribute("conv1", groups=0), "groups is 0"),
    "a size that grew": (attribute("conv1", in_channels=10**15), "in_channels is 10000000"),
    "a kernel": (attribute("conv1", kernel_size=[3, 10**9]), "kernel_size"),
    "a number of another kind": (attribute("bn1", eps=1), "eps is 1 in the file"),
    "a number that is none": (attribute("bn1", eps="1"), "modules: 'bn1': attributes: 'eps' is '1', not a finite"),
    "a layer without its weight": (lambda d: d["tensors"].update({"conv1.weight": None}), "contradict each other"),
    "a shape that is not the tensor's": (tensor("fc1.bias", shape=[10**12]), "'fc1.bias'"),
    "a dtype that is not the tensor's": (tensor("fc1.bias", dtype="float16"), "'fc1.bias'"),
    "a trained count": (tensor("bn1.num_batches_tracked", trains=True), "num_batches_tracked"),
    "a parameter as a buffer": (tensor("fc1.bias", kind="buffer", trains=False), "is a buffer in the file"),
    "a tie of what is there": (lambda d: d["tied"].update({"fc1.bias": "fc2.bias"}), "which cannot be"),
    "a tie to nothing": (tie("x", "y"), "which cannot be"),
    "a tie to itself": (tie("conv2.bias", "conv2.bias"), "which cannot be"),
    "a tie of other tensors": (tie("conv2.bias", "bn1.bias"), "contradict"),
    "a mode that is no flag": (lambda d: d["modules"]["bn1"].update(training=1), "'training' is 1, not true or false"),
    "no modules": (lambda d: d.pop("modules"), "the document has no 'modules'"),
    "a module that is a list": (lambda d: d["modules"].update(bn1=[]), "not a mapping"),
    "channels twice": (lambda d: d["kept"].update(conv1={"side": "out", "of": 8, "channels": [1, 1]}), "ascending"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_document_that_lies_with_a_valid_checksum(name, path):
    change, words = EDITS[name]
    edited(path, lambda document, header: change(document))
    refused(path, dense("plain"), words)


def test_attributes_that_the_model_does_not_have_are_left_out(path):
    names = ("forward", "_parameters", "__class__", "training", "new", "inplace", "padding_mode")
    evil = dict.fromkeys(names, 3)
    edited(path, lambda document, header: document["modules"]["conv1"]["attributes"].update(evil))
    model = intrafusion.load(path, dense("plain"))
    assert same(state(model), state(pruned("plain")))
    assert vars(model.conv1).keys() == vars(dense("plain").conv1).keys()


def test_a_failure_while_changing_puts_everything_back(path, monkeypatch):
    model, apply_ = dense("plain"), restore.Change.apply_

    def failing(change):
        apply_(change)
        if change.module is model.fc2:
            raise MemoryError

    monkeypatch.setattr(restore.Change, "apply_", failing)
    before, parameters = state(model), list(model.parameters())
    with pytest.raises(MemoryError):
        intrafusion.load(path, model)
    assert same(state(model), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("source", "outputs", "words"),
    [
        (None, None, "does not name its dense network"),
        ("os:getcwd", 4, "no code that a file names is run"),
        ("tests.nets:Plain", 4, "no code that a file names is run"),
        ("torchvision:resnet9000", 4, "torchvision has no network"),
        ("no_such_network", 4, "no network is called"),
        ("digits_cnn", 10**9, "has no tensor of that size"),
        ("digits_cnn", 0, "has no tensor of that size"),
        ("digits_cnn", 4, "does not fit this DigitsCNN"),
    ],
)
def test_a_source_that_does_not_give_the_network(source, outputs, words, path):
    intrafusion.save(pruned("plain"), path, source=source, num_classes=outputs)
    with pytest.raises(CheckpointError, match=words):
        intrafusion.load(path)


def test_what_cannot_be_saved_leaves_the_file_that_was_there(path):
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return 1

    before, folder = path.read_bytes(), sorted(os.listdir(path.parent))
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    wide = nn.Linear(2, 2)
    wide.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    careless, odd = nn.Sequential(nn.Linear(2, 3)), nn.Conv2d(2, 2, 1)
    careless[0].weight = nn.Parameter(careless[0].weight[:2].detach())
    odd.groups = torch.tensor(1)
    wrong = [
        (careless, r"attributes are not the sizes of their tensors: 0 \(its weight is \[2, 2\]"),
        (odd, "its groups is not a number"),
        (nn.Sequential(WithExtraState(2, 2)), "0 has extra state"),
        (nn.LazyLinear(3), "not initialised yet"),
        (nn.Linear(2, 2, device="meta"), "no plain dense tensors: weight"),
        (sparse, "no plain dense tensors: mask"),
        (wide, "safetensors cannot hold"),
    ]
    for model, words in wrong:
        with pytest.raises(CheckpointError, match=words):
            intrafusion.save(model, path)
    with pytest.raises(CheckpointError, match="recipe"):
        intrafusion.save(pruned("plain"), path, recipe={"model": nn.Linear})
    with pytest.raises(CheckpointError, match="recipe"):
        intrafusion.save(pruned("plain"), path, recipe=float("nan"))
    with pytest.raises(ValueError, match="go together"):
        intrafusion.save(pruned("plain"), path, source="digits_cnn")
    with pytest.raises(TypeError, match="must be an nn"):
        intrafusion.save(pruned("plain").state_dict(), path)
    assert (path.read_bytes(), sorted(os.listdir(path.parent))) == (before, folder)


@pytest.mark.parametrize("step", ["safetensors", "fsync"])
def test_a_full_disk_leaves_the_file_that_was_there(step, path, monkeypatch):
    before, error = path.read_bytes(), OSError(28, "No space left on device")
    if step == "safetensors":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(*_, **__):
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (container, "save_file")), full)
    with pytest.raises(OSError, match="No space"):
        intrafusion.save(CASES["residual"].model(), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_lazy_target_and_a_wrong_one(path):
    model = dense("plain")
    model.fc2 = nn.LazyLinear(4)
    with pytest.raises(CheckpointError, match="LazyLinear"):
        intrafusion.load(path, model)
    with pytest.raises(TypeError, match="must be an nn"):
        intrafusion.load(path, dense("plain").state_dict())
