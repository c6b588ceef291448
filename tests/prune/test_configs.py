"""Networks of `transformers` as they stand: pruned, saved, loaded without us, and generating the same tokens."""

import subprocess
import sys

import pytest
import torch

import intrafusion
from intrafusion import IntraFusionPruner
from tests.groups.test_heads import l1

transformers = pytest.importorskip("transformers", reason="pip install 'intrafusion[transformers]'")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}


def llama(**options):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, **options}, intermediate_size=24, num_key_value_heads=2, head_dim=4)
    )


def qwen2(**options):
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, intermediate_size=24, num_key_value_heads=2, **options)
    )


def opt(**options):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, pad_token_id=1, **options)
    )


def neox(**options):
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, **options))


def phi3(**options):
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**{**SIZES, "num_key_value_heads": 2, **options}, intermediate_size=24, pad_token_id=0)
    )


def falcon(**options):
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=24, **options)
    )


def pruned(make, fusion, widths, **options):
    torch.manual_seed(0)
    model = make(**options).eval()
    tokens = torch.randint(32, (48, 12))
    pruner = IntraFusionPruner(
        model, tokens[:1], l1(), widths=widths, fusion=fusion, calibration=[tokens] if fusion == "calibrated" else None
    )
    pruner.step()
    return model.eval(), pruner, tokens


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (llama, {"feed_forward": 0.5, "heads": 0.5, "stream": 0.5}),
        (qwen2, {"feed_forward": 0.5, "heads": 0.5}),
        (opt, {"feed_forward": 0.5}),
    ],
)
def test_a_pruned_model_is_loaded_as_it_is_saved(make, widths, fusion, tmp_path):
    model, pruner, tokens = pruned(make, fusion, widths)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens[:2]).logits, again(tokens[:2]).logits)
    assert any(attribute.module == "config" for attribute in pruner.report.attributes)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
@pytest.mark.parametrize(
    ("make", "widths", "units"),
    [
        (neox, {"feed_forward": 0.5}, "gpt_neox.layers.0.mlp.dense_4h_to_h"),
        (phi3, {"feed_forward": 0.5, "stream": 0.5}, "model.layers.0.mlp.down_proj"),
        (falcon, {"feed_forward": 0.5}, "transformer.h.0.mlp.dense_4h_to_h"),
    ],
)
def test_models_that_make_queries_keys_and_values_in_one_layer(make, widths, units, fusion, tmp_path):
    """The original class multiplies by one matrix where ours does by three: the same up to rounding."""
    model, pruner, tokens = pruned(make, fusion, widths)
    assert pruner.heads
    assert model.get_submodule(units).in_features == 12
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(model(tokens[:2]).logits, again(tokens[:2]).logits, atol=1e-6)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
@pytest.mark.parametrize("keys", [2, 4])
def test_heads_whose_number_is_read_from_the_config_of_all_layers_are_refused(keys, fusion):
    torch.manual_seed(0)
    model, tokens = phi3(num_key_value_heads=keys).eval(), torch.randint(32, (48, 12))
    before, config = model(tokens).logits, model.config
    given = {"fusion": fusion, "calibration": [tokens] if fusion == "calibrated" else None}
    with pytest.raises(ValueError, match="their number is read from the config of all layers"):
        IntraFusionPruner(model, tokens[:1], l1(), widths={"heads": 0.5}, **given)
    assert all(layer.self_attn.config is config for layer in model.model.layers)
    assert torch.allclose(model(tokens).logits, before, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_the_number_of_a_layer_is_not_a_number_of_heads(fusion):
    """SmolLM2's tenth layer is number 9 and has 9 heads: with another number it would read another layer's cache."""
    model, pruner, tokens = pruned(llama, fusion, {"heads": 0.5}, num_hidden_layers=6)
    assert model.config.num_attention_heads == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    assert not any("layer_idx" in attribute.name for attribute in pruner.report.attributes)
    assert torch.allclose(model(tokens[:2]).logits, model(tokens[:2], use_cache=False).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
def test_a_process_without_us_generates_the_same_tokens(tmp_path):
    model, _, tokens = pruned(llama, "calibrated", {"feed_forward": 0.5, "heads": 0.5})
    model.save_pretrained(tmp_path)
    script = f"""
import sys
sys.modules["intrafusion"] = sys.modules["torch_pruning"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
print(model.generate(torch.tensor({tokens[:1, :4].tolist()}), max_new_tokens=8, do_sample=False).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False).tolist()
    assert done.stdout.strip().splitlines()[-1] == str(ours)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
def test_a_layer_gets_a_bias_only_where_the_config_has_one():
    model, _, _ = pruned(qwen2, "calibrated", {"feed_forward": 0.5})
    layers = model.model.layers[0]
    assert layers.mlp.down_proj.bias is None
    assert layers.self_attn.o_proj.bias is None
    assert layers.self_attn.q_proj.bias is not None  # it always has one there
    model, _, _ = pruned(llama, "calibrated", {"feed_forward": 0.5})
    assert model.config.mlp_bias
    assert all(
        layer.bias is not None for layer in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.down_proj)
    )
    assert not model.config.attention_bias or model.model.layers[0].self_attn.o_proj.bias is not None


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*can only be cut")
def test_widths_that_no_config_can_say_are_told():
    torch.manual_seed(0)
    model = llama().eval()
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    pruner = IntraFusionPruner(
        model,
        torch.randint(32, (1, 12)),
        l1(),
        pruning_ratio_dict={layers[0]: 0.5, layers[1]: 0.25},
        widths={"feed_forward": 0.5},
        fusion="discard",
    )
    pruner.pruning_ratio_dict[model.model.layers[0].mlp.up_proj] = [0.0, 0.25]
    with pytest.warns(UserWarning, match=r"no config of LlamaForCausalLM describes.*intrafusion\.save"):
        pruner.step()
    assert model.config.intermediate_size == 24


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_a_config_that_its_own_class_refuses_is_told():
    torch.manual_seed(0)
    model = llama().eval()
    pruner = IntraFusionPruner(model, torch.randint(32, (1, 12)), l1(), widths={"stream": 0.3}, fusion="discard")
    with pytest.warns(UserWarning, match=r"refused by its own class.*round_to"):
        pruner.step()


def gpt2(**options):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2, **options
        )
    )


def test_conv1d_layers_become_linear_ones_that_are_saved_as_before(tmp_path):
    torch.manual_seed(0)
    model = gpt2().eval()
    tokens = torch.randint(32, (2, 12))
    before, shapes = model(tokens).logits, {name: value.shape for name, value in model.state_dict().items()}
    IntraFusionPruner(model, tokens[:1], l1(), widths={"feed_forward": 0.5}, fusion="discard")
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert isinstance(model.transformer.h[0].mlp.c_fc, torch.nn.Linear)
    model.save_pretrained(tmp_path)
    assert torch.allclose(type(model).from_pretrained(tmp_path).eval()(tokens).logits, before, atol=1e-5)
    again = gpt2()
    again.load_state_dict(model.state_dict())
    model.load_state_dict(again.state_dict())
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)


@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_a_pruned_gpt2_is_loaded_as_it_is_saved(fusion, tmp_path):
    model, _, tokens = pruned(gpt2, fusion, {"feed_forward": 0.5})
    assert model.config.n_inner == 32
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens[:2]).logits, again(tokens[:2]).logits)
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    again = intrafusion.load(tmp_path / "pruned.safetensors", gpt2().eval())
    assert torch.equal(model(tokens[:2]).logits, again(tokens[:2]).logits)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("widths", [{"heads": 0.5}, {"head_dim": 0.5}])
def test_numbers_of_heads_are_not_guessed_from_shapes(widths, tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
    ).eval()
    images = torch.randn(256, 3, 16, 16)
    IntraFusionPruner(model, images[:1], l1(), widths=widths, fusion="calibrated", calibration=[images]).step()
    assert (model.config.num_attention_heads, model.config.head_dim) == ((2, 4) if "heads" in widths else (4, 2))
    assert model.vit.layers[0].attention.q_proj.out_features == 8


def test_a_config_knows_nothing_of_widths_that_were_only_tried():
    torch.manual_seed(0)
    model, tokens = llama().eval(), torch.randint(32, (64, 12))
    before = model.config.to_dict()
    pruner = IntraFusionPruner(
        model, tokens[:1], l1(), widths={"feed_forward": 0.5}, fusion="calibrated", calibration=[tokens],
        allocation="measured-parameters",
    )  # fmt: skip
    groups = list(pruner.step(interactive=True))
    assert len(groups) == 2
    assert pruner.report.allocation is not None
    assert model.config.to_dict() == before
