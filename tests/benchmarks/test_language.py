"""The benchmark on language models: its texts, its judge, its table, and every method at the same widths."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks.language.__main__ import KINDS, losses
from benchmarks.language.methods import METHODS, pruned
from benchmarks.language.table import table
from benchmarks.language.texts import text

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture(scope="module")
def tiny():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    batches = list(torch.randint(32, (40, 12), generator=torch.Generator().manual_seed(1)).split(20))
    return transformers.LlamaForCausalLM(config).eval(), batches


def test_hardly_a_paragraph_of_the_documentation_is_in_two_parts():
    parts = {part: set(text("documentation", part).split("\n\n")) for part in ("train", "valid", "test")}
    long = {part: {one for one in found if len(one) > 100} for part, found in parts.items()}
    assert all(len(found) > 50 for found in long.values())
    shared = (long["train"] | long["valid"]) & long["test"]
    assert len(shared) < 0.05 * len(long["test"]), shared  # modules repeat what they inherit


def test_a_text_that_is_not_there_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="INTRAFUSION_DATA"):
        text("wikitext2", "test")


def test_the_loss_is_that_of_the_next_token():
    sequences = torch.tensor([[0, 1, 2], [2, 2, 2]])

    def sure_of_its_successor(tokens):
        return SimpleNamespace(logits=20.0 * torch.nn.functional.one_hot((tokens + 1) % 3, 3))

    found = losses(sure_of_its_successor, sequences, each=1)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] == pytest.approx(20.0, abs=1e-6)


def test_the_table_has_a_line_for_every_width_and_marks_the_least():
    rows = [
        {"row": "m-0/-/0/dense/64x128", "documentation": 1.0},
        {"row": "m-0/heads/0.3/discard/64x128", "documentation": 2.0, "wikitext2": 9.0},
        {"row": "m-0/heads/0.3/calibrated/64x128", "documentation": 1.25},
        {"row": "m-0/heads/0.3/CORP/64x128", "error": "did not run"},
        {"row": "m-0/all/0.3/discard/64x128", "documentation": 3.0},
    ]
    head, _, heads, both = table(rows, "documentation")
    assert [cell.strip() for cell in head.split("|")[5:-1]] == ["discard", "calibrated"]
    assert heads == "| m-0 | heads | 30% | 1.000 | 2.000 | **1.250** |"
    assert both == "| m-0 | all | 30% | 1.000 | **3.000** |  |"


def test_the_table_marks_what_the_sequences_do_not_tell_from_the_least():
    losses_of = {"discard": [2.0, 3.0, 4.0], "CORP": [1.0, 2.3, 3.0], "calibrated": [1.0, 2.0, 3.2]}
    rows = [
        {"row": f"m-0/heads/0.3/{name}/64x128", "documentation": sum(each) / 3, "documentation, each": each}
        for name, each in losses_of.items()
    ]
    *_, line = table(rows, "documentation")
    assert line == "| m-0 | heads | 30% |  | 3.000 | **2.100** | **2.067** |"


@needs_transformers
@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.allocation == "equal"])
def test_every_method_leaves_the_widths_of_the_cut(tiny, name):
    dense, batches = tiny
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    widths = dict.fromkeys(KINDS["all"], 0.5)
    model, _ = pruned(dense, name, widths, batches)
    cut, _ = pruned(dense, "discard", widths, batches)
    found = {key: value.shape for key, value in model.state_dict().items()}
    assert found.items() >= {key: value.shape for key, value in cut.state_dict().items()}.items()  # FLAP adds biases
    assert model.lm_head.weight.shape == (32, 8)
    assert {layer.mlp.up_proj.weight.shape for layer in model.model.layers} == {(12, 8)}
    assert torch.isfinite(model(batches[0]).logits).all()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@needs_transformers
@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.allocation != "equal"])
def test_unequal_widths_cost_no_more_than_equal_ones(tiny, name):
    dense, batches = tiny
    equal, _ = pruned(dense, "calibrated", {"feed_forward": 0.5}, batches)
    model, report = pruned(dense, name, {"feed_forward": 0.5}, batches)
    assert sum(p.numel() for p in model.parameters()) <= sum(p.numel() for p in equal.parameters())
    assert report.allocation is not None


@needs_transformers
@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.data])
def test_methods_that_see_text_come_closer_than_the_cut(tiny, name):
    dense, batches = tiny
    truth = dense(batches[0]).logits
    far = {}
    for one in ("discard", name):
        model, _ = pruned(dense, one, {"feed_forward": 0.5}, batches)
        far[one] = (model(batches[0]).logits - truth).norm().item()
    assert far[name] <= far["discard"] * (1 + 1e-6)
