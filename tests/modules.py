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

from lorasmith.native.baichuan2 import Baichuan2Config, Baichuan2ForCausalLM
from lorasmith.native.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from lorasmith.native.registry import register_native
from lorasmith.native.transnormer import TransNormerConfig, TransNormerForCausalLM
from lorasmith.testing.texts import random_examples
from lorasmith.types import Example

VOCAB = 96
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
KINDS = ("llama3", "deepseek", "baichuan2", "baichuan2-13b", "chatglm3", "transnormer", "qwen2", "gemma2")
"""Grouped heads; plain heads; a fused projection and NormHead; the same with ALiBi over heads that are no
power of two; two groups, biases and heads wider than the stream; linear attention; biases and tied embeddings
(generic); sliding windows and soft caps, which run one conversation at a time (generic)."""

_TARGETS = {
    "baichuan2": ["W_pack", "down_proj"],
    "baichuan2-13b": ["W_pack", "down_proj"],
    "chatglm3": ["query_key_value", "dense_4h_to_h"],
    "transnormer": ["qkvu_proj", "l3"],
}


def two_targets(kind: str) -> list[str]:
    """A projection of the attention and one of the feed-forward part."""
    return _TARGETS.get(kind, ["q_proj", "down_proj"])


register_native()


def tiny_module(
    kind: str, dtype: torch.dtype = torch.float64, *, max_positions: int = 256, seed: int = 7, **changes: int
) -> PreTrainedModel:
    sizes = {**_SIZES, **changes}
    positions = {"max_position_embeddings": max_positions}
    torch.manual_seed(seed)
    if kind == "llama3":
        module = LlamaForCausalLM(LlamaConfig(**sizes, **positions, num_key_value_heads=2))
    elif kind == "deepseek":
        module = LlamaForCausalLM(LlamaConfig(**sizes, **positions))
    elif kind == "baichuan2":
        module = Baichuan2ForCausalLM(Baichuan2Config(**sizes, **positions))
    elif kind == "baichuan2-13b":
        sizes |= {"hidden_size": 36, "num_attention_heads": 6}
        module = Baichuan2ForCausalLM(Baichuan2Config(**sizes, model_max_length=max_positions))
    elif kind == "chatglm3":
        sizes |= {"kv_channels": 12, "multi_query_group_num": 2}
        module = ChatGLM3ForCausalLM(ChatGLM3Config(**sizes, **positions))
    elif kind == "transnormer":
        module = TransNormerForCausalLM(
            TransNormerConfig(
                vocab_size=sizes["vocab_size"],
                decoder_embed_dim=32,
                hidden_dim=24,
                glu_dim=48,
                decoder_layers=3,
                decoder_attention_heads=6,
                model_max_length=max_positions,
                init_std=0.3,
            )
        )
    elif kind == "qwen2":
        config = Qwen2Config(**sizes, **positions, num_key_value_heads=2, tie_word_embeddings=True)
        module = Qwen2ForCausalLM(config)
    else:
        config = Gemma2Config(**sizes, **positions, num_key_value_heads=2, head_dim=8, sliding_window=4)
        module = Gemma2ForCausalLM(config)
    return module.to(dtype).eval()


def save_tiny(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_module(kind, dtype).save_pretrained(directory)
    return directory


def examples(count: int = 6, *, seed: int = 0, prefix: int = 3, longest: int = 20) -> list[Example]:
    """Conversations with a common start, of different lengths; about half the positions have a label."""
    return random_examples(VOCAB, count, seed=seed, prefix=prefix, longest=longest)
