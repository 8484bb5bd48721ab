"""Tiny random models, one for each kind of family, and examples to feed them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorasmith.testing.texts import random_examples
from lorasmith.types import Example

VOCAB = 96
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
KINDS = ("llama3", "deepseek", "qwen2", "gemma2")
"""Grouped heads; plain heads; biases and tied embeddings (generic); sliding windows and soft caps, which
run one conversation at a time (generic)."""


def tiny_module(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(7)
    if kind == "llama3":
        module = LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2))
    elif kind == "deepseek":
        module = LlamaForCausalLM(LlamaConfig(**_SIZES))
    elif kind == "qwen2":
        module = Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    else:
        config = Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4)
        module = Gemma2ForCausalLM(config)
    return module.to(dtype).eval()


def save_tiny(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_module(kind, dtype).save_pretrained(directory)
    return directory


def examples(count: int = 6, *, seed: int = 0, prefix: int = 3, longest: int = 20) -> list[Example]:
    """Conversations with a common start, of different lengths; about half the positions have a label."""
    return random_examples(VOCAB, count, seed=seed, prefix=prefix, longest=longest)
