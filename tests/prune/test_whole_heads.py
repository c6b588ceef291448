"""Whole attention heads: which go, how they are scored, and what stays."""

from __future__ import annotations

import pytest
import torch

from intrafusion import IntraFusionPruner, ReconstructionImportance
from tests.groups.test_heads import Network, l1, network


@pytest.mark.parametrize("fusion", ["discard", "calibrated", "data-free"])
@pytest.mark.parametrize(("shared", "left"), [(1, 2), (2, 2), (4, 2)])
def test_whole_heads_go_and_keys_that_others_share_stay(fusion, shared, left):
    model = network(rotary=True, shared=shared)
    x = torch.randn(64, 6, 5)
    pruner = IntraFusionPruner(
        model, x[:1], l1(), widths={"heads": 0.5}, fusion=fusion, calibration=[x] if fusion == "calibrated" else None
    )
    pruner.step()
    for block in model.blocks:
        assert block.q_proj.out_features == block.o_proj.in_features == 4 * left
        assert block.k_proj.out_features == block.v_proj.out_features == (4 * left if shared == 1 else 16 // shared)
        assert block.num_key_value_groups == (1 if shared == 1 else left * shared // 4)
    assert torch.isfinite(model(x)).all()


def test_the_heads_that_stay_are_those_that_were_kept():
    model = network(shared=2)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = IntraFusionPruner(model, torch.randn(1, 6, 5), l1(), widths={"heads": 0.5}, fusion="discard")
    pruner.step()
    for number, block in enumerate(model.blocks):
        old = dense[f"blocks.{number}.q_proj.weight"].unflatten(0, (4, 4))
        new = block.q_proj.weight.unflatten(0, (2, 4))
        kept = [next(i for i in range(4) if torch.equal(old[i], head)) for head in new]
        assert [head // 2 for head in kept] == [0, 1]  # one for each key
        columns = dense[f"blocks.{number}.o_proj.weight"].unflatten(1, (4, 4))[:, kept]
        assert torch.equal(block.o_proj.weight.unflatten(1, (2, 4)), columns)
        assert torch.equal(block.k_proj.weight, dense[f"blocks.{number}.k_proj.weight"])


@pytest.mark.parametrize("search", ["forward", "backward"])
@pytest.mark.parametrize("shared", [1, 2])
def test_whole_heads_are_scored_whole_and_one_that_another_makes_up_for_goes(shared, search):
    torch.manual_seed(0)
    model = Network(blocks=1, heads=4, shared=shared, dim=4).eval()
    block = model.blocks[0]
    with torch.no_grad():  # heads 0 and 1, of one key where keys are shared, attend alike and give the same
        block.q_proj.weight[4:8], block.q_proj.bias[4:8] = block.q_proj.weight[:4], block.q_proj.bias[:4]
        if shared == 1:
            for layer in (block.k_proj, block.v_proj):
                layer.weight[4:8], layer.bias[4:8] = layer.weight[:4], layer.bias[:4]
        block.o_proj.weight[:, 4:8].mul_(5)  # large, and not needed
    x = torch.randn(64, 6, 5)
    metric = ReconstructionImportance([x], search=search)
    pruner = IntraFusionPruner(model, x, metric, widths={"heads": 0.25}, fusion="calibrated", calibration=[x])
    (group,) = (group for group in pruner.all_groups() if pruner.is_attention(group))
    pruner.current_step = 1  # before the first one, no head is to go
    scores = pruner.estimate_importance(pruner._downstream_node_as_root_if_attention(group)).unflatten(0, (4, 4))
    assert torch.equal(scores, scores[:, :1].expand(4, 4))
    assert int(scores[:, 0].argmin()) in (0, 1)
    pruner.current_step = 0
    dense = model(x).detach()
    pruner.step()
    if shared == 1:  # otherwise a head of each key goes
        assert float((model(x).detach() - dense).norm() / dense.norm()) < 1e-3
