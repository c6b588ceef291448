"""Small networks with nn.MultiheadAttention, and pruners of them."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from intrafusion import IntraFusionPruner
from intrafusion.groups.multihead import PartedAttention
from tests.groups.test_heads import l1

HEADS, DIM, WIDTH = 4, 4, 16


class Encoder(nn.Module):
    """A linear layer, two of torch's transformer layers, scores."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False):
        super().__init__()
        self.batch_first, self.inputs, self.scores = batch_first, nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=batch_first, norm_first=norm_first)
        nested = batch_first and not norm_first
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def tokens(self, x: Tensor, **masks: Tensor) -> Tensor:
        """[N, L, 5] -> [N, L, E]"""
        x = self.inputs(x)
        return (
            self.encoder(x, **masks) if self.batch_first else self.encoder(x.transpose(0, 1), **masks).transpose(0, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.tokens(x).mean(dim=1))


class Attending(nn.Module):
    """Sequences of another kind are attended to; heads may have masks of their own, or copies of one."""

    def __init__(self, masks: str = "", **options):
        super().__init__()
        self.inputs, self.others, self.scores = nn.Linear(5, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.attention, self.norm = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options),
            nn.LayerNorm(WIDTH),
        )
        self.masks, self.count = masks, HEADS
        self.slopes = torch.arange(1.0, HEADS + 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y, mask = self.inputs(x), self.others(y), None
        if self.masks:
            places = torch.arange(y.shape[1]).float().expand(x.shape[1], -1)
            each = self.slopes[:, None, None] * places if self.masks == "own" else places.expand(self.count, -1, -1)
            mask = each.repeat(len(x), 1, 1)
        return self.scores((x + self.attention(self.norm(x), y, y, attn_mask=mask)[0]).mean(dim=1))


class Shown(nn.Module):
    """Attention whose weights are given as well, or pool the tokens."""

    def __init__(self, pools: bool = False, average: bool = True):
        super().__init__()
        self.pools, self.average, self.inputs, self.scores = pools, average, nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.inputs(x)
        read, weights = self.attention(x, x, x, average_attn_weights=self.average)
        return self.scores((x + read) * weights.mean(1)[..., None]) if self.pools else (self.scores(x + read), weights)


def random_(model: nn.Module) -> nn.Module:
    """Larger weights than attention starts with, and biases that are not zero."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def vit() -> nn.Module:
    return VisionTransformer(32, 16, 2, HEADS, WIDTH, 24, num_classes=3)


NETWORKS = {
    "batch first": (Encoder, (torch.randn(64, 6, 5),)),
    "batch second": (lambda: Encoder(batch_first=False), (torch.randn(64, 6, 5),)),
    "norm first": (lambda: Encoder(norm_first=True), (torch.randn(64, 6, 5),)),
    "vit": (vit, (torch.randn(64, 3, 32, 32),)),
    "cross": (Attending, (torch.randn(64, 6, 5), torch.randn(64, 7, 6))),
}
EXAMPLE = (torch.randn(64, 6, 5), torch.randn(64, 7, 6))
networks = pytest.mark.parametrize("name", NETWORKS)


def network(name: str = "batch first"):
    """(network, inputs)"""
    make, inputs = NETWORKS[name]
    return random_(make()), inputs


def attentions(model: nn.Module) -> list:
    return [layer for layer in model.modules() if isinstance(layer, (nn.MultiheadAttention, PartedAttention))]


def pruner_of(model, inputs, importance=None, fusion="discard", **options) -> IntraFusionPruner:
    scores = model.heads if isinstance(model, VisionTransformer) else model.scores
    free = [(p, 2) for name, p in model.named_parameters() if name.endswith(("_token", "pos_embedding"))]
    return IntraFusionPruner(
        model,
        tuple(x[:2] for x in inputs),
        importance or l1(),
        fusion=fusion,
        calibration=[inputs] if fusion == "calibrated" else None,
        ignored_layers=[scores, *options.pop("ignored", ())],
        unwrapped_parameters=free,
        **options,
    )


def parameters_of(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters()}


def is_whole(model: nn.Module, parameters: dict[str, int]) -> bool:
    """Has every attention the class and the parameters that it had?"""
    return (
        all(type(layer) is nn.MultiheadAttention for layer in attentions(model)) and parameters_of(model) == parameters
    )
