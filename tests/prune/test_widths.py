"""A ratio for each kind of width."""

import pytest
import torch
from torch import nn

from intrafusion import FusionError, IntraFusionPruner
from tests.groups.test_heads import l1, network

X = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))


def widths_of(model):
    block = model.blocks[0]
    return block.o_proj.in_features, block.head_dim, model.up.out_features, model.inputs.out_features


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ({"feed_forward": 0.5}, (16, 4, 10, 12)),
        ({"heads": 0.5}, (8, 4, 20, 12)),
        ({"head_dim": 0.5}, (8, 2, 20, 12)),
        ({"stream": 0.5}, (16, 4, 20, 6)),
        ({"feed_forward": 0.5, "heads": 0.25, "stream": 0.25}, (12, 4, 10, 9)),
        ({"feed_forward": 0.0, "heads": 0.5}, (8, 4, 20, 12)),
    ],
)
def test_only_what_is_named_is_cut(widths, expected):
    model = network()
    pruner = IntraFusionPruner(model, X, l1(), widths=widths, ignored_layers=[model.scores], fusion="discard")
    pruner.step()
    assert widths_of(model) == expected
    assert model.scores.out_features == 3
    assert torch.isfinite(model(X)).all()


def test_several_steps_come_to_the_ratio():
    model = network()
    pruner = IntraFusionPruner(
        model, X, l1(), widths={"feed_forward": 0.5}, iterative_steps=2, ignored_layers=[model.scores], fusion="discard"
    )
    pruner.step()
    assert model.up.out_features == 15
    pruner.step()
    assert model.up.out_features == 10


@pytest.mark.parametrize(
    ("widths", "error", "said"),
    [
        ({"hidden": 0.5}, ValueError, "'hidden': choose among 'feed_forward', 'heads'"),
        ({"heads": 1.0}, ValueError, r"widths\['heads'\] is 1.0: it must be in \[0, 1\)"),
        ({"heads": True}, ValueError, "is True"),
        ([("heads", 0.5)], TypeError, "give a dictionary"),
        ({"channels": 0.5}, ValueError, "'channels', but this network has feed_forward, head_dim, heads, stream"),
    ],
)
def test_what_means_nothing_is_refused(widths, error, said):
    model = network()
    with pytest.raises(error, match=said):
        IntraFusionPruner(model, X, l1(), widths=widths, ignored_layers=[model.scores])


@pytest.mark.parametrize(
    ("widths", "named"),
    [
        ({"heads": 0.9}, "'heads' by 0.9"),  # of four heads, rounded up: all
        ({"heads": 0.9, "head_dim": 0.5}, "'head_dim' by 0.5, 'heads' by 0.9"),  # of these one group
        ({"feed_forward": 0.99}, "'feed_forward' by 0.99"),
        ({"stream": 0.99, "feed_forward": 0.5, "head_dim": 0.9}, "'head_dim' by 0.9, 'stream' by 0.99"),
    ],
)
def test_a_ratio_that_rounds_to_everything_is_told(widths, named):
    model = network()
    pruner = IntraFusionPruner(model, X, l1(), widths=widths, ignored_layers=[model.scores], fusion="discard")
    with pytest.warns(UserWarning, match=f"nothing was cut of {named}") as told:
        pruner.step()
    assert len([one for one in told if "nothing was cut" in str(one.message)]) == 1


def test_what_an_earlier_step_has_cut_is_not_told():
    model = network()
    pruner = IntraFusionPruner(
        model, X, l1(), widths={"heads": 0.9}, iterative_steps=3, ignored_layers=[model.scores], fusion="discard"
    )
    for _ in range(3):
        pruner.step()  # 2 of 4, 1 of 2, none of 1
    assert model.blocks[0].o_proj.in_features == 4


def test_a_stream_that_heads_write_last_keeps_its_own_ratio():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    model = transformers.PhiForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(40, (2, 8))}
    IntraFusionPruner(model, ids, l1(), widths={"stream": 0.25, "heads": 0.5}, fusion="discard").step()
    assert model.get_input_embeddings().weight.shape == (40, 12)
    assert model.model.layers[0].self_attn.q_proj.out_features == 8


@pytest.mark.filterwarnings("ignore:nothing was cut of 'heads' by 0.9")
@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"iterative_steps": 2}])
@pytest.mark.parametrize("fusion", ["discard", "data-free"])
def test_heads_that_would_all_go_stay_where_the_stream_goes(options, fusion):
    model = network()
    pruner = IntraFusionPruner(
        model, X, l1(), widths={"heads": 0.9, "stream": 0.5}, ignored_layers=[model.scores], fusion=fusion, **options
    )
    pruner.progress = False
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    assert model.inputs.out_features == 6
    assert torch.isfinite(model(X)).all()


def test_ratios_that_were_allocated_are_told_nothing_of():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()
    options = {"widths": {"channels": 0.5, "feed_forward": 0.2}, "allocation": "measured-parameters"}
    pruner = IntraFusionPruner(model, torch.randn(2, 1, 6, 6), l1(), ignored_layers=[model[6]], **options)
    pruner.progress = False
    pruner.step()
    pruner.asked._waiting = {"feed_forward"}  # as where a ratio of 0 was found best
    pruner.asked.warn(pruner)
    pruner.report.allocation = None
    with pytest.warns(UserWarning, match="nothing was cut of 'feed_forward' by 0.2"):
        pruner.asked.warn(pruner)


def test_a_step_that_failed_has_cut_nothing():
    model, fails = network(), [True]

    def after(*_):
        if fails:
            raise RuntimeError("no")

    pruner = IntraFusionPruner(
        model, X, l1(), widths={"feed_forward": 0.5}, ignored_layers=[model.scores], fusion="discard", after_cut=after
    )
    with pytest.raises(FusionError, match="no"):
        pruner.step()
    fails.clear()
    pruner.round_to = 32
    with pytest.warns(UserWarning, match="nothing was cut of 'feed_forward' by 0.5"):
        pruner.step()
    assert model.up.out_features == 20


def test_a_convolutional_network_has_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 2)
    )
    x = torch.randn(1, 1, 6, 6)
    pruner = IntraFusionPruner(model, x, l1(), widths={"channels": 0.5}, ignored_layers=[model[5]], fusion="discard")
    pruner.step()
    assert (model[0].out_channels, model[2].out_channels, model[4].out_features) == (4, 4, 6)
