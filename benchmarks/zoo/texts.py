"""Small configurations of transformers' networks: their inputs are tables of tokens, images or sounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 120,
    "max_position_embeddings": 64,
}  # fmt: skip
_SEEN = {key: _SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
_DECODER = {**_SMALL, "num_key_value_heads": 4, "use_cache": False, "pad_token_id": 0}
_PIXELS = {**_SEEN, "image_size": 32, "patch_size": 8, "num_labels": 10}


@dataclass(frozen=True)
class Text:
    """One network of transformers. model, config: names of its classes. options: of the config. image: whether it reads
    images of 32 pixels, not tokens.
    """

    name: str
    model: str
    config: str
    options: dict[str, Any]
    image: bool = False
    millions: float = 0.3

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config)

    @property
    def inputs(self) -> Callable[[int, int], Any]:
        return self._images if self.image else self._tokens

    def _tokens(self, count: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 120, (count, 11), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _images(self, count: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}


_GPT2 = {
    "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 64, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 10,
}  # fmt: skip
_DISTIL = {
    "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 120, "max_position_embeddings": 64,
    "num_labels": 10,
}  # fmt: skip
_OPT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 120,
    "max_position_embeddings": 64, "word_embed_proj_dim": 48, "use_cache": False,
}  # fmt: skip
_FALCON = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 120,
    "num_kv_heads": 2, "new_decoder_architecture": True, "use_cache": False,
}  # fmt: skip
_CONVNEXT = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_labels": 10}
_RESNET = {
    "embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1], "layer_type": "bottleneck",
    "num_labels": 10,
}  # fmt: skip

TEXTS = (
    Text("bert", "BertForSequenceClassification", "BertConfig", {**_SMALL, "num_labels": 10}),
    Text("roberta", "RobertaForSequenceClassification", "RobertaConfig", {**_SMALL, "num_labels": 10}),
    Text("electra", "ElectraForSequenceClassification", "ElectraConfig",
         {**_SMALL, "embedding_size": 24, "num_labels": 10}),
    Text("albert", "AlbertForSequenceClassification", "AlbertConfig",
         {**_SMALL, "embedding_size": 24, "num_labels": 10}),
    Text("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    Text("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    Text("opt", "OPTForCausalLM", "OPTConfig", _OPT),
    Text("llama", "LlamaForCausalLM", "LlamaConfig", _DECODER),
    Text("llama-grouped", "LlamaForCausalLM", "LlamaConfig", {**_DECODER, "num_key_value_heads": 2}),
    Text("mistral", "MistralForCausalLM", "MistralConfig", {**_DECODER, "num_key_value_heads": 2}),
    Text("qwen2", "Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "num_key_value_heads": 2}),
    Text("phi3", "Phi3ForCausalLM", "Phi3Config", {**_DECODER, "num_key_value_heads": 2}),
    Text("glm", "GlmForCausalLM", "GlmConfig", {**_DECODER, "num_key_value_heads": 2, "head_dim": 12}),
    Text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SMALL, "use_cache": False}),
    Text("falcon", "FalconForCausalLM", "FalconConfig", _FALCON),
    Text("bloom", "BloomForCausalLM", "BloomConfig",
         {"vocab_size": 120, "hidden_size": 48, "n_layer": 2, "n_head": 4, "use_cache": False}),
    Text("vit", "ViTForImageClassification", "ViTConfig", _PIXELS, image=True),
    Text("deit", "DeiTForImageClassification", "DeiTConfig", _PIXELS, image=True),
    Text("convnext", "ConvNextForImageClassification", "ConvNextConfig", _CONVNEXT, image=True),
    Text("resnet", "ResNetForImageClassification", "ResNetConfig", _RESNET, image=True),
)  # fmt: skip
"""All small: what breaks in a large one breaks in these."""
