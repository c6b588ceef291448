"""Synthetic inputs are in the units of the example; what cannot be drawn is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import FusionError, IntraFusionPruner, ReconstructionImportance
from intrafusion.correct.synthetic import NoSyntheticInputs, synthetic_count, synthetic_inputs
from intrafusion.correct.units import Units
from intrafusion.prune.inputs import inputs_for, synthetic_batches


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def drawn(model, example, **kwargs):
    return synthetic_inputs(model, example, call, progress=False, **kwargs)


EXAMPLES = {
    "bytes as numbers": torch.randint(0, 256, (2, 3, 16, 16)).float(),
    "decibels": -40 + 12 * torch.randn(2, 1, 24, 16),
    "pascals": 101325 + 300 * torch.randn(4, 40),
    "zero to one": torch.rand(1, 3, 16, 16),
    "one sequence": 1e-3 * torch.randn(1, 30, 8) + 5e-3,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_range_and_spread_are_the_examples(name):
    example = EXAMPLES[name]
    batches = drawn(nn.Identity(), (example,), count=64)
    values = torch.cat([batch[0] for batch in batches])
    assert values.shape == (64, *example.shape[1:])
    assert values.dtype == example.dtype
    assert (values.min(), values.max()) >= (example.min(), example.min())
    assert values.max() <= example.max()
    spread = example.std().item()
    assert values.mean().item() == pytest.approx(example.mean().item(), abs=0.4 * spread)
    assert 0.5 * spread < values.std().item() < 1.5 * spread


@pytest.mark.parametrize(
    "example",
    [torch.zeros(2, 3, 8, 8), torch.ones(1, 40), torch.randn(1, 3, 8, 8), torch.randn(64, 20), torch.tensor([[7.0]])],
)
def test_an_example_that_says_nothing_leaves_standard_numbers(example):
    assert Units.of(example).are_standard
    values = torch.randn(5)
    assert Units.of(example).apply(values) is values


def test_channels_of_images_have_units_of_their_own():
    scale = torch.tensor([1.0, 100.0, 1e-3]).reshape(1, 3, 1, 1)
    example = scale * (3 + torch.rand(2, 3, 16, 16))
    values = torch.cat([batch[0] for batch in drawn(nn.Identity(), (example,), count=64)])
    torch.testing.assert_close(values.mean((0, 2, 3)), example.mean((0, 2, 3)), rtol=0.05, atol=0)


class Bytes(nn.Module):
    """Scales bytes itself."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 12, 3),
            nn.Conv2d(12, 4, 1),
        )

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x / 255 - 0.5)).relu()).relu())  # fmt: skip


@pytest.mark.parametrize("example", [torch.zeros(1, 3, 12, 12).byte(), torch.randint(0, 256, (2, 3, 12, 12)).byte()])
def test_bytes_are_drawn_as_bytes_and_agree_with_the_batch_norms(example):
    model = Bytes().eval()
    model.norm.running_mean = 0.2 * torch.randn(16)
    values = torch.cat([batch[0] for batch in drawn(model, (example,), count=32)])
    assert values.dtype == torch.uint8
    assert values.float().std() > 20
    dense = copy.deepcopy(model)
    pruner = IntraFusionPruner(
        model, example, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.3, ignored_layers=[model.c]
    )
    pruner.progress = False
    pruner.step()
    assert len(pruner.report.fused) == 2
    assert dense(values).isfinite().all()


def test_batch_norms_choose_between_the_examples_units_and_standard_ones():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).eval()
    for mean, example in ((0.0, torch.rand(2, 3, 16, 16)), (120.0, 120 + 60 * torch.randn(2, 3, 16, 16))):
        model[0].running_mean.fill_(mean)
        model[0].running_var.fill_(1.0 if mean == 0 else 3600.0)
        ((batch,),) = drawn(model, (example,), count=16)
        assert batch.mean().item() == pytest.approx(mean, abs=30 if mean else 0.3)
        assert batch.std().item() == pytest.approx(60 if mean else 1.0, rel=0.3)


def test_lists_of_images_are_drawn_as_lists():
    for example in (
        ([torch.rand(3, 9, 9), torch.rand(3, 9, 9)],),
        {"images": [torch.rand(3, 9, 9), torch.rand(3, 8, 7)]},
    ):
        batches = drawn(nn.Identity(), example, count=20)
        given = [batch["images"] if isinstance(batch, dict) else batch[0] for batch in batches]
        assert sum(map(len, given)) == 20
        assert {image.shape for images in given for image in images} == {(3, 9, 9)}
        assert min(image.min().item() for images in given for image in images) >= 0
        assert synthetic_count(nn.Identity(), example) > 20


@pytest.mark.parametrize("as_pruners_take_it", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_synthetic_batches_are_those_of_data_free_for_anybody(as_pruners_take_it):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    example = torch.rand(1, 3, 8, 8)
    model(example)
    batches = synthetic_batches(model, as_pruners_take_it(example), count=40, seed=3)
    given = torch.cat([batch["input"] if isinstance(batch, dict) else batch[0] for batch in batches])
    assert given.shape == (40, 3, 8, 8)
    assert torch.equal(given, torch.cat([batch[0] for batch in synthetic_batches(model, example, count=40, seed=3)]))
    metric = ReconstructionImportance(batches)
    pruner = IntraFusionPruner(model, example, metric, pruning_ratio=0.5, ignored_layers=[model[4]], fusion="discard")
    pruner.step()
    assert model[0].out_channels == 4
    with pytest.raises(TypeError, match="example_inputs batch 0 is a str"):
        synthetic_batches(model, "cat.png")


class Chain(nn.Module):
    """What comes next depends on a token and the one before: gated, or with a convolution that looks back."""

    def __init__(self, gated, vocabulary=23, width=24):
        super().__init__()
        self.token, self.gated = nn.Embedding(vocabulary, width), gated
        self.back = nn.Conv1d(width, width, 2)
        self.up, self.gate, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        x = self.token(input_ids)
        x = x + self.back(F.pad(x.mT, (1, 0))).mT
        y = self.up(x)
        y = y * self.gate(x).sigmoid() if self.gated else F.gelu(y)
        return {"logits": 3 * self.head(x + self.down(y)), "cache": None}


def language_model(gated):
    torch.manual_seed(3)
    return Chain(gated).eval()


TOKENS = {"ids": lambda t: (t,), "with a mask": lambda t: {"input_ids": t, "attention_mask": torch.ones_like(t)}}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("length", [12, 150])
def test_a_language_model_writes_what_it_would_write_one_token_after_the_other(name, length):
    model, example = language_model(False), TOKENS[name](torch.zeros(2, length, dtype=torch.long))
    batches = drawn(model, example, count=4800 // length)
    tokens = torch.cat([b["input_ids"] if isinstance(b, dict) else b[0] for b in batches])
    assert tokens.numel() == pytest.approx(4800, rel=0.1)
    assert tokens.shape[1] == min(length, 49)
    logits = model(tokens)["logits"]
    given = logits[:, :-1].log_softmax(-1)
    said = -given.gather(-1, tokens[:, 1:, None]).mean().item()
    entropy = -(given.exp() * given).sum(-1).mean().item()
    assert said == pytest.approx(entropy, abs=0.06)  # as surprised as by its own text
    assert entropy < 0.95 * math.log(23)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=3
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)
    return model


@pytest.mark.parametrize("name", TOKENS)
def test_a_model_that_can_generate_writes_whole_texts(name):
    model, example = llama(), TOKENS[name](torch.zeros(2, 80, dtype=torch.long))
    state = torch.get_rng_state()
    batches = drawn(model, example, count=60)
    assert torch.equal(torch.get_rng_state(), state)
    tokens, again = (
        torch.cat([b["input_ids"] if isinstance(b, dict) else b[0] for b in some])
        for some in (batches, drawn(model, example, count=60))
    )
    assert torch.equal(tokens, again)
    assert tokens.shape == (60, 80)
    given = model(tokens).logits[:, :-1].log_softmax(-1)
    entropy = -(given.exp() * given).sum(-1)
    said = -given.gather(-1, tokens[:, 1:, None])[..., 0]
    for part in (slice(0, 40), slice(40, None)):
        assert said[:, part].mean().item() == pytest.approx(entropy[:, part].mean().item(), abs=0.06)
    assert entropy.mean() < 0.95 * math.log(23)


@pytest.mark.parametrize("name", TOKENS)
def test_beside_a_users_text_a_model_writes_as_much_of_its_own(name, monkeypatch):
    model, given = llama(), TOKENS[name]
    own = [given(torch.randint(4, 23, (3, 20))), given(torch.randint(4, 23, (3, 20)))]
    example = given(torch.zeros(1, 8, dtype=torch.long))
    pruner = IntraFusionPruner(
        model, example, tp.importance.GroupMagnitudeImportance(p=1), widths={"feed_forward": 0.5}, calibration=own,
        fusion="calibrated",
    )  # fmt: skip
    inputs = inputs_for(pruner, pruner.fusion.method())
    tokens = torch.cat([batch["input_ids"] if isinstance(batch, dict) else batch[0] for batch in inputs.drawn])
    assert tokens.shape == (6, 20)  # as long as the texts, not as the example
    assert synthetic_count(language_model(False), example, own) == 0  # it would take many passes
    monkeypatch.setattr("intrafusion.correct.sequences._ENOUGH", 120)
    assert synthetic_count(model, own[0], own) == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_data_free_is_better_than_discarding_on_other_text(gated, ones):
    dense, gaps = language_model(gated), {}
    example = torch.full((1, 12), int(ones), dtype=torch.long)
    text = torch.cat([batch[0] for batch in drawn(dense, (example,), count=200, seed=7)])
    for fusion in ("discard", "data-free"):
        model = copy.deepcopy(dense)
        pruner = IntraFusionPruner(
            model, example, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5, fusion=fusion,
            ignored_layers=[model.token, model.back, model.down, model.head],
        )  # fmt: skip
        pruner.progress = False
        pruner.step()
        assert model.up.out_features == 32
        wanted = dense(text)["logits"].softmax(-1)
        gaps[fusion] = (wanted * (wanted.log() - model(text)["logits"].log_softmax(-1))).sum(-1).mean().item()
    assert gaps["data-free"] < 0.7 * gaps["discard"]


class Classifier(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.token, self.a, self.head = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, classes)

    def forward(self, ids):
        return self.head(self.a(self.token(ids)).relu().mean(1))


class Both(Classifier):
    """Scores for every token, from both sides."""

    def forward(self, ids):
        x = self.token(ids)
        return F.linear(self.a(x + x.mean(1, keepdim=True)).relu()[..., :12], self.token.weight)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, t):
        return self.head(self.a(x).relu() * (1 + t.reshape(-1, 1)))


ids = torch.arange(10).reshape(2, 5)
REFUSED = {
    "tokens of a classifier": (Classifier, (ids,), "a score for every token of a vocabulary"),
    "tokens read from both sides": (Both, (ids,), "depends on those behind it"),
    "a time step beside": (Several, (torch.randn(2, 6), torch.tensor([3, 4])), "integers cannot be drawn"),
    "two inputs without a batch-norm": (Several, (torch.randn(2, 6), torch.randn(2, 1)), "several inputs belong"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_asks_for_calibration_and_changes_nothing(name):
    kind, example, said = REFUSED[name]
    model = kind().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NoSyntheticInputs, match=said):
        drawn(model, example)
    pruner = IntraFusionPruner(model, example, tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.head])
    with pytest.raises(FusionError, match=rf"{said}.*Give fusion='calibrated' with calibration="):
        pruner.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pruner.current_step == 0
    assert synthetic_count(model, example, [example]) == 0


@pytest.mark.parametrize("fusion", ["data-free", "calibrated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_more_than_it_stores(dtype, fusion):
    """Inputs so large, and so many, that a sum of squares, or of values, is beyond float16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    x = 300 + 100 * torch.randn(512, 32)
    gaps = {}
    for name, precision in (("discard", dtype), (fusion, dtype), ("float32", torch.float32)):
        model = copy.deepcopy(net).to(precision)
        preset = fusion if name == "float32" else name
        more = {"calibration": [x.to(precision)]} if preset == "calibrated" else {}
        pruner = IntraFusionPruner(
            model, x[:8].to(precision), tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model[4]],
            fusion=preset, **more,
        )  # fmt: skip
        pruner.progress = False
        pruner.step()
        gaps[name] = (model(x.to(precision)).float() - net(x)).norm().item() / net(x).norm().item()
    assert gaps[fusion] < 0.5 * gaps["discard"]
    assert gaps[fusion] < 2 * gaps["float32"] + 0.02
