"""nn.MultiheadAttention loses heads, and channels inside them: what is computed, saved and exported then."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch_pruning as tp
from torch.optim.swa_utils import AveragedModel

import intrafusion
from intrafusion import FusionSchedule, ReconstructionImportance
from tests.groups.attending import DIM, HEADS, NETWORKS, WIDTH, attentions, network, networks, pruner_of


@pytest.mark.filterwarnings("ignore:.*could only be cut")
@networks
@pytest.mark.parametrize("fusion", ["discard", "barycentre", "calibrated"])
@pytest.mark.parametrize(
    ("widths", "heads", "dim", "stream"),
    [
        ({"heads": 0.5}, 2, 4, 16),
        ({"head_dim": 0.5}, 4, 2, 16),
        ({"heads": 0.25, "head_dim": 0.5, "stream": 0.25}, 3, 2, 12),
    ],
    ids=str,
)
def test_widths_are_cut_and_a_file_is_loaded_again(name, widths, heads, dim, stream, fusion, tmp_path):
    model, x = network(name)
    pruner_of(model, x, fusion=fusion, widths=widths).step()
    for layer in attentions(model):
        assert (layer.num_heads, layer.head_dim, layer.scale) == (heads, dim, DIM**-0.5)
        assert (layer.embed_dim, layer.kdim, layer.vdim, layer.out_proj.out_features) == (stream,) * 4
        assert layer.in_proj_weight.shape == (3 * heads * dim, stream)
    assert torch.isfinite(model(*x)).all()
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    with torch.device("meta"):
        empty = NETWORKS[name][0]()
    for dense in (NETWORKS[name][0](), empty):
        assert torch.equal(intrafusion.load(tmp_path / "pruned.safetensors", dense)(*x), model(*x))


def test_a_file_is_loaded_in_a_fresh_process(tmp_path):
    model, (x,) = network("vit")
    pruner_of(model, (x,), widths={"heads": 0.5, "stream": 0.25}).step()
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    torch.save((x, model(x)), tmp_path / "outputs.pt")
    code = f"""
import torch, intrafusion
from torchvision.models.vision_transformer import VisionTransformer
model = intrafusion.load("pruned.safetensors", VisionTransformer(32, 16, 2, {HEADS}, {WIDTH}, 24, num_classes=3))
x, expected = torch.load("outputs.pt")
assert torch.equal(model(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@networks
def test_a_cut_head_is_one_whose_output_nobody_reads(name):
    model, x = network(name)
    dense = copy.deepcopy(model)

    def second(group):
        return (torch.arange(len(group[0].idxs)) // DIM != 1).float()

    pruner_of(model, x, second, widths={"heads": 0.25}).step()
    with torch.no_grad():
        for layer in attentions(dense):
            layer.out_proj.weight[:, DIM : 2 * DIM] = 0
    torch.testing.assert_close(model(*x), dense(*x), rtol=1e-5, atol=1e-5)


@networks
def test_twin_heads_leave_without_a_trace(name):
    model, x = network(name)
    with torch.no_grad():
        for layer in attentions(model):
            for parameter in (layer.in_proj_weight, layer.in_proj_bias):
                twins = parameter.unflatten(0, (3, HEADS // 2, 2, DIM))
                twins[:, :, 1] = twins[:, :, 0]
    before = model(*x)

    def second_ones(group):
        return (torch.arange(len(group[0].idxs)) // DIM % 2 == 0).float() + 1

    pruner_of(model, x, second_ones, fusion="calibrated", widths={"heads": 0.5}).step()
    assert all(layer.out_proj.in_features == 2 * DIM for layer in attentions(model))
    assert (model(*x) - before).norm() < 2e-3 * before.norm()


@networks
def test_channels_inside_heads_leave_without_a_trace_where_their_circuits_have_that_rank(name):
    model, x = network(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in attentions(model):
            for parameter in (layer.in_proj_weight, layer.in_proj_bias):
                each = parameter.unflatten(0, (3 * HEADS, DIM))
                basis = torch.randn(3 * HEADS, DIM, 2, generator=generator)
                each.copy_(basis @ each[:, :2].flatten(2) if each.dim() > 2 else (basis @ each[:, :2, None])[..., 0])
    before = model(*x)
    pruner_of(model, x, fusion="calibrated", widths={"head_dim": 0.5}).step()
    assert all(layer.head_dim == 2 for layer in attentions(model))
    assert (model(*x) - before).norm() < 2e-3 * before.norm()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_torchs_kernel_for_whole_layers_is_not_taken_for_parted_ones():
    model, (x,) = network()
    padding = torch.arange(6) >= torch.arange(64)[:, None] % 4 + 3
    with torch.no_grad():  # the layers are handed nested tensors; what is padded is 0 afterwards
        before = model.tokens(x, src_key_padding_mask=padding)
    pruner = pruner_of(model, (x,), widths={"heads": 0.5})
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(x, src_key_padding_mask=padding), before, rtol=1e-5, atol=1e-5)
    assert (before[padding] == 0).all()
    pruner.step()
    slow = model.tokens(x, src_key_padding_mask=padding), model(x)
    with torch.no_grad():
        fast = model.tokens(x, src_key_padding_mask=padding), model(x)
    torch.testing.assert_close(fast[0], slow[0].masked_fill(padding[..., None], 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-5, atol=1e-5)


def test_it_is_parted_for_torch_prunings_own_arguments():
    model, x = network()
    layer = attentions(model)[0]
    told = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "prune_head_dims": False, "num_heads": {layer: HEADS}}
    pruner_of(model, x, pruning_ratio=0.25, **told).step()
    assert [(one.num_heads, one.head_dim, one.embed_dim) for one in attentions(model)] == [(2, 4, 12)] * 2


@networks
def test_a_pruned_network_is_copied_pickled_and_exported(name):
    model, x = network(name)
    pruner_of(model, x, widths={"heads": 0.5}).step()
    expected, file = model(*x), io.BytesIO()
    assert torch.equal(copy.deepcopy(model)(*x), expected)
    torch.save(attentions(model), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)[0]
    tokens = torch.randn(2, 6, WIDTH)
    assert torch.equal(again(tokens, tokens, tokens)[0], attentions(model)[0](tokens, tokens, tokens)[0])
    exported = torch.export.export(model, x).module()
    torch.testing.assert_close(exported(*x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_pruned_network_is_an_onnx_file(tmp_path):
    model, x = network("vit")
    pruner_of(model, x, widths={"heads": 0.5, "stream": 0.25}).step()
    assert intrafusion.export(model, tmp_path / "model.onnx", x[0][:2]).difference < 1e-5


@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_an_average_made_before_the_pruner_follows_a_step(fusion):
    model, x = network()
    average = AveragedModel(model)
    pruner = pruner_of(model, x, fusion=fusion, widths={"heads": 0.5, "stream": 0.25}, iterative_steps=2)
    schedule = FusionSchedule(pruner, at=[1, 2], ema=average)
    average.update_parameters(model)  # as many parameters, of the same shapes
    assert schedule.step()
    assert schedule.step()
    assert [(layer.num_heads, layer.embed_dim) for layer in attentions(average)] == [(2, 12)] * 2
    torch.testing.assert_close(average(*x), model(*x))


def test_gradients_from_before_the_pruner_are_there_for_an_importance():
    model, x = network()
    model(*x).square().sum().backward()
    expected = [layer.in_proj_weight.grad for layer in attentions(model)]
    pruner = pruner_of(model, x, tp.importance.GroupTaylorImportance(), widths={"heads": 0.5})
    for layer, whole in zip(attentions(model), expected, strict=True):
        assert torch.equal(torch.cat([part.weight.grad for part in layer.parts]), whole)
    pruner.step()
    assert all(layer.num_heads == 2 for layer in attentions(model))


def test_several_steps_lose_heads_and_the_channels_inside_of_them():
    model, x = network()
    options = {"widths": {"heads": 0.5, "head_dim": 0.5}, "iterative_steps": 2, "fusion": "calibrated"}
    pruner = pruner_of(model, x, ReconstructionImportance([x[0]], search="backward"), **options)
    pruner.step()
    pruner.step()
    assert [(layer.num_heads, layer.head_dim) for layer in attentions(model)] == [(2, 2)] * 2
    assert torch.isfinite(model(*x)).all()
