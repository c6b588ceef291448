"""A network on a GPU is pruned there, to what it becomes in main memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import Fusion, IntraFusionPruner, ReconstructionImportance
from tests.fake_gpu import GPU, fake_gpu, is_on_gpu
from tests.nets import PICO, Case

DESCENT = Fusion(merge="barycentre", cost="l2", correct="calibrated", descent=2)


def pruned(model: nn.Module, example: Tensor, batches: list[Tensor], options: Mapping[str, Any]) -> nn.Module:
    """Pruned on the device where all of it is."""
    fusion, metric = options["fusion"], options.get("importance", tp.importance.GroupMagnitudeImportance(p=1))
    asked = Fusion.preset(fusion) if isinstance(fusion, str) else fusion
    pruner = IntraFusionPruner(
        model, example, metric(batches) if isinstance(metric, type) else metric,
        calibration=batches if asked.method().inputs == "calibration" else None,
        **{key: value for key, value in options.items() if key != "importance"},
    )  # fmt: skip
    pruner.progress = False
    pruner.step()
    return model


def same_on_gpu(
    build: Callable[[], nn.Module], example: Tensor, batches: list[Tensor], options: Callable[[nn.Module], dict]
) -> None:
    here = build()
    wanted = pruned(here, example, batches, options(here)).state_dict()
    with fake_gpu():
        there = build().to("cuda")
        pruned(there, example.to("cuda"), [batch.to("cuda") for batch in batches], options(there))
        tensors = {**dict(there.named_parameters()), **dict(there.named_buffers())}
        assert all(is_on_gpu(value) for value in tensors.values())
        found = {name: value.cpu() for name, value in there.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
@pytest.mark.parametrize("fusion", ["paper", "data-free"])  # and calibrated: below
@pytest.mark.filterwarnings("ignore")  # of random networks
def test_every_preset(case: Case, fusion: str) -> None:
    batches = list(torch.randn(16, *case.shape, generator=torch.Generator().manual_seed(3)).split(8))
    same_on_gpu(
        case.model, case.example(), batches,
        lambda model: {"fusion": fusion, "pruning_ratio": 0.5, "ignored_layers": case.ignored(model)},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "calibrated", "importance": ReconstructionImportance},
        {"fusion": "calibrated", "allocation": "measured"},
        {"fusion": "calibrated", "memory_limit": 1e-6},
        {"fusion": DESCENT},
        {"fusion": Fusion(merge="barycentre", source_mass="importance", target_mass="partial", cost="cosine")},
    ],
    ids=["importance", "allocation", "memory limit", "descent", "masses"],
)
@pytest.mark.filterwarnings("ignore")
def test_every_option(options: dict) -> None:
    case = PICO[0]
    batches = list(torch.randn(24, *case.shape, generator=torch.Generator().manual_seed(3)).split(12))
    same_on_gpu(
        case.model, case.example(), batches,
        lambda model: {"pruning_ratio": 0.5, "ignored_layers": case.ignored(model), **options},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["feed_forward", "heads", "head_dim", "stream"])
@pytest.mark.filterwarnings("ignore")
def test_every_width_of_a_transformer(kind: str) -> None:
    transformers = pytest.importorskip("transformers")

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.OPTConfig(
            vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.0, activation_function="gelu",
        )  # fmt: skip
        return transformers.OPTForCausalLM(config).eval()

    tokens = torch.randint(40, (16, 12), generator=torch.Generator().manual_seed(0))
    same_on_gpu(build, tokens[:1], list(tokens.split(8)), lambda _: {"fusion": "calibrated", "widths": {kind: 0.5}})


def test_what_mixes_devices_fails() -> None:
    with fake_gpu():
        there, here = torch.ones(3).to(GPU), torch.ones(3)
        assert there.device == (2 * there).device == torch.zeros_like(there).device == GPU
        assert (there.cpu() + here).device == here.device
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([there.sum(), here.sum()])
        with pytest.raises(RuntimeError, match="same device"):
            here * there.sum()
        assert (there * here.sum()).device == GPU
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=GPU, generator=torch.Generator())
        there[:2] = here[:2]
        with pytest.raises(RuntimeError, match="indices"):
            here[there.long()]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
