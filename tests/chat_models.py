"""Small whole chat-model directories, weights and tokenizer, and rows to train them on."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers_factory
import torch
from transformers import LlamaConfig, LlamaForCausalLM

_WRITERS = {
    "llama3": tokenizers_factory.llama3_like,
    "deepseek": tokenizers_factory.deepseek_like,
    "generic": tokenizers_factory.chatml,
}
FAMILIES = tuple(_WRITERS)


def chat_model(family: str, directory: Path) -> Path:
    """A random Llama behind a byte-level vocabulary with the family's special tokens."""
    _WRITERS[family](directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def alpaca_rows(path: Path, count: int = 24) -> Path:
    rows = [
        {"instruction": f"What is {n} and {n}?", "input": "", "output": f"It is {2 * n}. 是。"}
        for n in range(count)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
