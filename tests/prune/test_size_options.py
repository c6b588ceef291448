"""What attributes may have become: of several numbers that would fit, the one that is meant."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.prune.size_options import Width, is_size, options_of
from tests.prune.test_sizes import PLAIN


class Free(nn.Module):
    """As OPT's: the number of tokens is what is left, so that wrong sizes run too, over other tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.embed, self.head = nn.Linear(6, dim), nn.Linear(dim, 4)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        y = self.embed(x)
        q, k, v = (
            layer(y).view(len(x), -1, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(y + self.out_proj(attended.reshape(len(x), x.shape[1], -1)))


def test_what_is_as_large_as_the_number_of_heads_by_chance_is_not_surely_one():
    model = Free(48, 4)
    options = options_of(
        {(model, name): 4 for name in ("num_heads", "h", "stride")},
        [Width(48, 24, model.q_proj, heads=(4, 2), keys=(4, 2))],
    )
    assert {option.name for option in options if option.value == 2 and option.sure} == {"num_heads", "h"}


def test_where_a_module_is_is_no_size():
    assert is_size("depths", (2, 2))
    assert is_size("num_heads", 4)
    assert not any(is_size(name, 4) for name in ("layer_idx", "layer_id", "depth", "block_index"))


@pytest.mark.filterwarnings("ignore::intrafusion.prune.twin.WorseThanCut", "ignore:.*could only be cut")
@pytest.mark.parametrize("fusion", PLAIN)
@pytest.mark.parametrize(("dim", "heads"), [(48, 4), (16, 4), (12, 2)])
def test_a_number_of_heads_is_not_taken_for_the_size_of_one(dim, heads, fusion):
    """48 channels are 4 heads of 12, and also 3 times 4 of 4; 16 are 4 heads of 4."""
    torch.manual_seed(0)
    model = Free(dim, heads).eval()
    pruner = IntraFusionPruner(
        model, torch.randn(2, 5, 6), tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.head],
        num_heads=dict.fromkeys((model.q_proj, model.k_proj, model.v_proj), heads), fusion=fusion,
    )  # fmt: skip
    pruner.step()
    assert model.q_proj.out_features == dim // 2
    assert (model.num_heads, model.head_dim) == (heads, dim // heads // 2)
