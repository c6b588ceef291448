"""A small network from a seed: as Python code that can be read and run, with weights, inputs and settings.

python -m tests.sweep --show 17      # the code of network 17
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sweep.blocks import FLAT, SPATIAL, unit
from tests.sweep.draft import Draft, Value, call

_SIZES = {1: 12, 2: 8, 3: 5}
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Drawn:
    """What a seed says.

    source: the code of a class `Network`; shape: of one input; heads: names of the layers that give the outputs;
    inputs: how inputs are distributed; ratio, global_pruning: as torch-pruning has them.
    """

    seed: int
    source: str
    shape: tuple[int, ...]
    heads: tuple[str, ...]
    inputs: str
    ratio: float
    global_pruning: bool

    def __str__(self) -> str:
        settings = f"inputs={self.inputs} ratio={self.ratio} global_pruning={self.global_pruning}"
        return f"# seed {self.seed}: input {self.shape}, heads {', '.join(self.heads)}, {settings}\n{self.source}"

    def batch(self, count: int, part: int) -> Tensor:
        """[count, *shape] inputs; another part holds other ones."""
        return _INPUTS[self.inputs](count, self.shape, torch.Generator().manual_seed(1000 * self.seed + part))

    def model(self) -> nn.Module:
        """The network in eval mode, its weights random, its batch-norms with the statistics of part 0."""
        space: dict = {}
        exec(compile(self.source, f"<network {self.seed}>", "exec"), space)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = space["Network"]()
            _randomise_(model)
        return self.settle_(model)

    @torch.no_grad()
    def settle_(self, model: nn.Module) -> nn.Module:
        """One pass in train mode, after which batch-norms hold the statistics of part 0; then eval mode."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # the average over all calls
            norm.reset_running_stats()
        model.train()(self.batch(64, part=0))
        for norm in norms:
            norm.momentum = 0.1
        return model.eval()

    def ignored(self, model: nn.Module) -> list[nn.Module]:
        """The layers that keep their outputs."""
        return [model.get_submodule(name) for name in self.heads]


def draw(seed: int) -> Drawn:
    """Network number `seed`."""
    source = random.Random(seed)
    dim = source.choices([0, 1, 2, 3], [2, 1, 6, 1])[0]
    draft = Draft(source, dim, tokens=dim == 0 and source.random() < 0.5)
    channels, size = source.choice([3, 4] if dim else [8, 12]), _SIZES.get(dim, 0)
    shape = (channels, *[size] * dim) if dim else ((5, channels) if draft.tokens else (channels,))
    x = unit(draft, Value("x", channels, size))
    blocks = SPATIAL if dim else FLAT
    for block in source.choices(list(blocks), list(blocks.values()), k=source.choice([1, 2, 2, 3, 3, 4])):
        x = block(draft, x)
    returned = _heads(draft, x)
    inputs = source.choices(list(_INPUTS), [3, 3, 1])[0] if dim else source.choice(["white", "shifted"])
    ratio, everywhere = source.choice([0.25, 0.5, 0.5, 0.7]), draft.chance(0.15)
    return Drawn(seed, draft.source(returned), shape, tuple(draft.heads), inputs, ratio, everywhere)


def _heads(draft: Draft, x: Value) -> str:
    """What is returned: the output of one head, of two, or of one that is called at two scales."""
    if draft.dim and x.size >= 4 and draft.chance(0.12):
        return _shared_head(draft, x)
    outputs = [_head(draft, x)]
    if draft.chance(0.08):
        outputs.append(_head(draft, x))
    return outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"


def _head(draft: Draft, x: Value) -> str:
    if draft.dim == 0:
        pooled = Value(f"{x.name}.mean(1)" if draft.tokens and draft.chance(0.5) else x.name, x.channels)
    elif draft.chance(0.12):
        made = draft.layer("head", call(f"nn.Conv{draft.dim}d", x.channels, 4, 1))
        draft.heads.append(made.removeprefix("self."))
        return f"{made}({x.name})"
    else:
        pooled = _pooled(draft, x)
    made = draft.layer("head", call("nn.Linear", pooled.channels, 4))
    draft.heads.append(made.removeprefix("self."))
    return f"{made}({pooled.name})"


def _pooled(draft: Draft, x: Value) -> Value:
    """A vector: the mean, everything, or a small map of means; a hidden layer behind it at times."""
    way = draft.random.choice(["mean", "mean", "flatten", "adaptive"])
    if way == "flatten" and x.channels * x.size**draft.dim <= 1024:
        y = draft.value(f"{x.name}.flatten(1)", x.channels * x.size**draft.dim)
    elif way == "adaptive":
        name = draft.random.choice([f"F.adaptive_avg_pool{draft.dim}d", f"F.adaptive_max_pool{draft.dim}d"])
        y = draft.value(f"torch.flatten({name}({x.name}, 2), 1)", x.channels * 2**draft.dim)
    else:
        y = draft.value(f"{x.name}.mean({draft.axes})", x.channels)
    if not draft.chance(0.3):
        return y
    flat = Draft(draft.random, 0, heads=draft.heads, _init=draft._init, _forward=draft._forward, _names=draft._names)
    return unit(flat, y)


def _shared_head(draft: Draft, x: Value) -> str:
    """One head, one tower before it at times, called at two scales."""
    half = draft.value(f"F.avg_pool{draft.dim}d({x.name}, 2)", x.channels, x.size // 2)
    scales = [x, half]
    if draft.chance(0.6):
        width = draft.width()
        tower = draft.layer("tower", call(f"nn.Conv{draft.dim}d", x.channels, width, 3, padding=1))
        scales = [draft.value(f"F.relu({tower}({one.name}))", width, one.size) for one in scales]
    made = draft.layer("head", call(f"nn.Conv{draft.dim}d", scales[0].channels, 4, 1))
    draft.heads.append(made.removeprefix("self."))
    return f"({', '.join(f'{made}({one.name})' for one in scales)})"


def _randomise_(model: nn.Module) -> None:
    """Norms and slopes of their own, some scales negative: fresh ones would hide mistakes."""
    for module in model.modules():
        if isinstance(module, _NORMS) and module.weight is not None:
            sign = torch.where(torch.rand(module.weight.shape) < 0.15, -1.0, 1.0)
            module.weight.data = sign * (0.5 + torch.rand(module.weight.shape))
            if getattr(module, "bias", None) is not None:
                module.bias.data = 0.4 * torch.randn(module.bias.shape)
        if isinstance(module, nn.PReLU):
            module.weight.data = 0.5 * torch.rand(module.weight.shape)


def _white(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(count, *shape, generator=generator)


def _shifted(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Positive, with correlated channels."""
    return (1.5 + _white(count, shape, generator) + torch.randn(count, *[1] * len(shape), generator=generator)).abs()


def _smooth(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A coarse map, sampled up, and a little noise."""
    coarse = torch.randn(count, shape[0], *[3] * (len(shape) - 1), generator=generator)
    mode = {2: "linear", 3: "bilinear", 4: "trilinear"}[len(shape)]
    return F.interpolate(coarse, size=shape[1:], mode=mode, align_corners=False) + 0.2 * _white(count, shape, generator)


_INPUTS = {"white": _white, "smooth": _smooth, "shifted": _shifted}
