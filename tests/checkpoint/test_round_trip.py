"""`load(save(m))` is `m`, bit for bit, for every kind of layer, dtype, wrapper and mode."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

import intrafusion
from intrafusion.checkpoint import describe, inventory
from tests.checkpoint.networks import CASES, Tied, dense, output, pruned, pruner_of, same, state
from tests.nets import Plain

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pruned.safetensors"


def round_trip(model: nn.Module, target: nn.Module, path, **options) -> nn.Module:
    intrafusion.save(model, path, **options)
    loaded = intrafusion.load(path, target)
    assert loaded is target
    assert same(state(loaded), state(inventory.unwrap(model)))
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_a_cut_network_comes_back(name, path):
    model = pruned(name)
    loaded = round_trip(model, dense(name), path)
    assert torch.equal(output(loaded, name), output(model, name))


def without_biases(width=8):
    convs = nn.Conv2d(3, width, 3, bias=False), nn.ReLU(), nn.Conv2d(width, 6, 3, bias=False), nn.ReLU()
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(24, 4, bias=False))


def test_a_corrected_network_comes_back_with_the_biases_that_the_correction_added(path):
    model, example = without_biases(), torch.randn(2, 3, 6, 6)
    pruner_of(model, example, [model[-1]], fusion="data-free")
    assert any(name.endswith("bias") for name, _ in model.named_parameters())
    assert torch.equal(round_trip(model, without_biases(), path)(example), model(example))


def test_a_bias_that_appears_and_one_that_goes(path):
    model = pruned("plain")
    model.conv1.bias = nn.Parameter(torch.randn(model.conv1.out_channels))
    model.fc2.bias = None
    loaded = round_trip(model, dense("plain"), path)
    assert loaded.conv1.bias is not None
    assert loaded.fc2.bias is None


def test_a_network_that_was_not_pruned_comes_back(path):
    model = CASES["residual"].model()
    assert torch.equal(output(round_trip(model, dense("residual"), path), "residual"), output(model, "residual"))


def test_a_loaded_network_can_be_pruned_again_saved_again_and_trained(path):
    model = round_trip(pruned("plain"), dense("plain"), path)
    pruner_of(model, CASES["plain"].example(), CASES["plain"].ignored(model))
    loaded = round_trip(model, dense("plain"), path)
    F.cross_entropy(loaded.train()(CASES["plain"].example()), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_file_wins(dtype, path):
    loaded = round_trip(pruned("plain").to(dtype), dense("plain"), path)
    assert loaded.conv1.weight.dtype is dtype


def test_mixed_dtypes_and_values_that_are_not_finite(path):
    model = pruned("plain")
    model.conv1.half()
    model.fc1.weight.data[0, 0], model.fc1.weight.data[0, 1] = float("nan"), float("-inf")
    round_trip(model, dense("plain"), path)


def test_frozen_parameters_and_the_mode_of_every_module(path):
    model = pruned("plain").train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    loaded = round_trip(model, dense("plain").eval(), path)
    assert loaded.training
    assert not loaded.bn1.training
    assert not loaded.conv1.weight.requires_grad
    assert loaded.conv2.weight.requires_grad


@pytest.mark.parametrize(("saved", "given"), [(True, True), (True, False), (False, True), (False, False)])
def test_ties_are_those_of_the_saved_network(saved, given, path):
    model, tokens = Tied(6, tie=saved), torch.arange(11)
    loaded = round_trip(model, Tied(8, tie=given), path)
    assert (loaded.head.weight is loaded.embed.weight) == saved
    assert loaded.norm.scale is loaded.scale
    assert "scale" not in loaded.state_dict()
    assert torch.equal(loaded(tokens), model(tokens))
    assert sum(entry is not None for entry in describe(path).tensors.values()) == (7 if saved else 8)


def test_numbers_of_the_users_own_modules_follow(path):
    loaded = round_trip(Tied(6), Tied(8), path)
    assert (loaded.factor, loaded.heads, loaded.window) == (6**-0.5, 3, [6, 3])


def test_views_of_one_storage_are_stored_each_and_no_larger_than_they_are(path):
    model, whole = Tied(6), torch.rand(1000)
    model.norm.weight.data, model.other.weight.data, model.norm.bias.data = whole[:6], whole[3:9], whole[::2][:6]
    round_trip(model, Tied(8), path)
    small = path.stat().st_size
    intrafusion.save(Tied(6), path)
    assert small == path.stat().st_size


def test_shared_modules_and_lists_of_parameters(path):
    def build(width):
        block = nn.Linear(width, width)
        extra = nn.ParameterList([torch.rand(width), torch.rand(2)])
        return nn.ModuleDict({"first": block, "second": block, "extra": extra})

    loaded = round_trip(build(3), build(4), path)
    assert loaded["first"] is loaded["second"]
    assert loaded["first"].in_features == 3


def test_recurrent_layers_and_attention(path):
    def build(width):
        torch.manual_seed(width)
        return nn.ModuleDict(
            {"lstm": nn.LSTM(3, width, bidirectional=True), "attention": nn.MultiheadAttention(2 * width, 2)}
        )

    model, loaded = build(4), build(6)
    round_trip(model, loaded, path)
    x = torch.randn(5, 1, 3)
    y = model["lstm"](x)[0]
    assert torch.equal(loaded["lstm"](x)[0], y)
    assert torch.equal(loaded["attention"](y, y, y)[0], model["attention"](y, y, y)[0])


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda model: nn.DataParallel(compiled(model))])
@pytest.mark.parametrize("which", ["saved", "loaded", "both"])
def test_wrappers_leave_no_trace(wrap, which, path):
    model, target = pruned("plain"), dense("plain")
    expected = output(model, "plain")
    given = wrap(model) if which != "loaded" else model
    loaded = round_trip(given, target if which == "saved" else wrap(target), path)
    assert torch.equal(output(loaded, "plain"), expected)
    assert all(not name.startswith(("module.", "_orig_mod.")) for name in describe(path).tensors)


def test_a_compiled_part_of_a_network(path):
    model = pruned("plain")
    model.conv1 = compiled(model.conv1)
    loaded = dense("plain")
    intrafusion.save(model, path)
    intrafusion.load(path, loaded)
    assert torch.equal(output(loaded, "plain"), output(model, "plain"))


@gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_device_is_the_models_or_the_one_asked_for(where, path):
    model = pruned("plain").cuda()
    intrafusion.save(model, path)
    assert next(intrafusion.load(path, dense("plain").to(where)).parameters()).device.type == where
    loaded = intrafusion.load(path, dense("plain"), device="cuda")
    assert same(state(loaded), state(model))


def test_a_model_without_memory_is_filled_on_the_cpu(path):
    model = pruned("residual")
    with torch.device("meta"):
        empty = CASES["residual"].build()
    loaded = round_trip(model, empty, path)
    assert torch.equal(output(loaded, "residual"), output(model, "residual"))


@pytest.mark.parametrize("source", ["digits_cnn", "torchvision:squeezenet1_1"])
def test_the_dense_network_is_built_from_its_source_without_touching_the_random_state(source, path):
    from intrafusion.lab.models import build_model

    model = build_model(source, 7)
    intrafusion.save(model, path, source=source, num_classes=7)
    before = torch.get_rng_state()
    loaded = intrafusion.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(loaded), state(model))


def test_the_document_says_what_was_asked_for(path):
    model = CASES["plain"].model()
    weight = model.conv1.weight.clone()
    pruner = pruner_of(model, CASES["plain"].example(), CASES["plain"].ignored(model))
    recipe = {"prune": {"ratios": [0.5]}, "sha256": "0" * 64, "note": "ä \ud800"}
    intrafusion.save(model, path, recipe=recipe, pruner=pruner)
    said = describe(path)
    assert json.loads(json.dumps(recipe)) == said.recipe
    assert {"torch", "torch-pruning"} <= said.packages.keys()
    kept = said.kept["conv1"]
    assert (kept.side, kept.of) == ("out", 8)
    assert torch.equal(weight[list(kept.channels)], model.conv1.weight)
    assert said.kept.keys() == {"conv1", "conv2", "fc1"}


def test_kept_channels_are_those_of_the_dense_network_after_several_steps(path):
    model = Plain(16)
    weight = model.conv1.weight.clone()
    pruner = pruner_of(model, CASES["plain"].example(), [model.fc2], iterative_steps=3)
    pruner.step()
    pruner.step()
    intrafusion.save(model, path, pruner=pruner)
    assert torch.equal(weight[list(describe(path).kept["conv1"].channels)], model.conv1.weight)


def test_the_same_network_gives_the_same_bytes(path):
    model = pruned("plain")
    intrafusion.save(model, path)
    first = path.read_bytes()
    intrafusion.save(round_trip(model, dense("plain"), path), path)
    assert path.read_bytes() == first


def vision_transformer():
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return VisionTransformer(**sizes, num_classes=4).eval()


def test_a_vision_transformer_cut_in_its_residual_stream(path):
    model, x = vision_transformer(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph = tp.DependencyGraph().build_dependency(model, (x,))
    graph.get_pruning_group(model.conv_proj, tp.prune_conv_out_channels, [1, 2, 9, 10]).prune()
    model.hidden_dim = 12
    loaded = round_trip(model, vision_transformer(), path)
    assert loaded.class_token.shape == (1, 1, 12)
    assert loaded.encoder.layers[0].self_attention.head_dim == 6
    assert torch.equal(loaded(x), model(x))


def test_heads_that_are_gone_stay_gone(path):
    models = pytest.importorskip("timm.models.vision_transformer")

    def build():
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 4}
        return models.VisionTransformer(**sizes).eval()

    model, x = build(), torch.randn(2, 3, 16, 16)
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    ignored = [model.head, model.patch_embed.proj, *(block.mlp.fc2 for block in model.blocks)]
    pruner = pruner_of(model, x, ignored, num_heads=heads, prune_num_heads=True, head_pruning_ratio=0.5)
    for block in model.blocks:
        attention = block.attn
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
    loaded = round_trip(model, build(), path)
    assert loaded.blocks[0].attn.num_heads == 2
    assert torch.equal(loaded(x), model(x))
