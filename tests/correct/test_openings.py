"""How sequences begin: refits see every token as the first of a sequence of its own, and nothing else does."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner
from intrafusion.correct.correction import Correction
from intrafusion.correct.sequences import openings
from intrafusion.prune.inputs import inputs_for
from tests.correct.test_units import TOKENS, Classifier, language_model, llama


def run(network, batch):
    return network(**batch) if isinstance(batch, dict) else network(*batch)


def tokens_of(batches):
    return torch.cat([batch["input_ids"] if isinstance(batch, dict) else batch[0] for batch in batches])


def pruner_of(model, own, given, fusion="calibrated", **options):
    return IntraFusionPruner(
        model, given(torch.zeros(1, 8, dtype=torch.long)), tp.importance.GroupMagnitudeImportance(p=1), fusion=fusion,
        calibration=own if fusion == "calibrated" else None, **{"widths": {"feed_forward": 0.5}, **options},
    )  # fmt: skip


@pytest.mark.parametrize("fusion", ["calibrated", "data-free"])
@pytest.mark.parametrize("name", TOKENS)
def test_every_token_of_the_texts_opens_a_sequence(name, fusion):
    given = TOKENS[name]
    own = [given(torch.randint(4, 20, (3, 20))), given(torch.randint(4, 20, (3, 20)))]
    pruner = pruner_of(llama(), own, given, fusion)
    inputs = inputs_for(pruner, pruner.fusion.method())
    found = tokens_of(inputs.openings)
    assert found.shape[1] == 1
    assert torch.equal(found.flatten().sort().values, tokens_of(inputs.batches).unique())
    assert all(type(batch) is type(inputs.batches[0]) for batch in inputs.openings)
    again = inputs_for(pruner, pruner.fusion.method()).openings
    assert torch.equal(found, tokens_of(again))


def _opened(model, own, drawn=()):
    generator = torch.Generator().manual_seed(0)
    return openings(model, own[0], run, own, drawn, generator=generator)


class Late(nn.Module):
    """A first token is something else here in a longer sequence."""

    def __init__(self):
        super().__init__()
        self.inner = language_model(False)

    def forward(self, input_ids):
        return {"logits": self.inner(input_ids)["logits"] * input_ids.shape[1]}


class Fixed(Late):
    def forward(self, input_ids):
        return {"logits": self.inner(input_ids.reshape(-1, 20))["logits"]}


def test_there_are_none_where_they_would_say_nothing():
    texts = [(torch.randint(4, 23, (6, 20)),)]
    assert len(_opened(language_model(False), texts)) == 1
    begun = [(torch.cat([torch.ones(6, 1, dtype=torch.long), texts[0][0]], dim=1),)]
    assert _opened(language_model(False), begun) == []
    assert _opened(language_model(False), begun, texts) == []  # whatever the model writes
    assert _opened(Classifier(), [(texts[0][0] % 11,)]) == []  # it gives no scores of tokens
    assert _opened(Late(), texts) == []
    assert _opened(Fixed(), texts) == []
    assert _opened(language_model(False), [(torch.randn(2, 3),)]) == []


def _refitted(model, batches, opened):
    """What a step makes of a network with these openings, and what its readers were seen to read."""
    pruner = pruner_of(model, batches, TOKENS["ids"])
    seen = []
    samples = Correction.samples

    def noted(self, table):
        seen.append(samples(self, table))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intrafusion.prune.inputs.openings", lambda *_, **__: opened)
        patch.setattr(Correction, "samples", noted)
        pruner.step()
    return seen


class Sink(nn.Module):
    """A language model with something of its own for the first token, on which all others rest."""

    def __init__(self, vocabulary=40, width=16):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.register_buffer("opens", (torch.arange(width) < width // 2).float())
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids):
        x = self.token(input_ids)
        x = torch.cat([x[:, :1] * self.opens, x[:, 1:] * (1 - self.opens)], dim=1)
        y = self.down(torch.relu(self.up(x)))
        return {"logits": self.head(y[:, :1] + 0.1 * y)}


def test_what_a_network_makes_of_first_tokens_it_has_not_seen_there():
    torch.manual_seed(0)
    model = Sink().eval()
    tokens = torch.randint(40, (12, 30))
    tokens[:, 0] = torch.arange(12) % 3  # a few tokens only were seen in the first place
    batches = [(tokens,)]
    others = torch.arange(3, 40)[:, None]
    error = {}
    for name, opened in (("without", []), ("with", [(tokens.unique()[:, None],)])):
        pruned = copy.deepcopy(model)
        seen = _refitted(pruned, batches, opened)
        error[name] = (pruned(others)["logits"] - model(others)["logits"]).norm() / model(others)["logits"].norm()
        shapes = [tuple(sample.h.shape) for samples in seen for sample in samples]
        assert shapes
        assert all(shape[0] == 360 for shape in shapes)  # rows are not chosen on openings
    assert error["with"] < 0.8 * error["without"]
