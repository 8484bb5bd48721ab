"""What every contestant of throughput.py is given: the same random model, the same rows, as files.

A model directory holds random weights from one seed, and a tokenizer whose words are decimal ids, so that a
trainer which insists on a tokenizer finds pad and end tokens within the model's vocabulary.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

import lorasmith as ls
from lorasmith.api import load_chat_format
from lorasmith.native.registry import register_native

SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_SPECIALS, FIRST_SPECIAL = 16, 100_000
"""DeepSeek's special tokens are the ids from FIRST_SPECIAL on; at most NUM_SPECIALS of them."""

NEEDS = """This benchmark needs two files that are not part of the project:
  --data       huanhuan.json: dataset/huanhuan.json of github.com/datawhalechina/self-llm
  --tokenizer  the tokenizer.json of deepseek-ai/deepseek-llm-7b-chat"""


@dataclass(frozen=True)
class Shape:
    """A model by the keys of its config.json, and what LoRA adapts in it."""

    title: str
    config: Mapping[str, Any]
    targets: tuple[str, ...] = LINEAR


_LLAMA_160M = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_CHATGLM3 = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "padded_vocab_size": 65_024,
    "hidden_size": 768,
    "ffn_hidden_size": 2560,
    "num_layers": 8,
    "num_attention_heads": 12,
    "kv_channels": 64,
    "multi_query_group_num": 2,
    "seq_length": 4096,
    "layernorm_epsilon": 1e-5,
}
_TRANSNORMER = {
    "model_type": "transnormer",
    "architectures": ["TransnormerForCausalLM"],
    "vocab_size": 64_000,
    "decoder_embed_dim": 768,
    "decoder_layers": 8,
    "decoder_attention_heads": 6,
    "hidden_dim": 768,
    "glu_dim": 2304,
    "linear_use_lrpe_list": [1, 0, 0, 0, 0, 0, 0, 0],
    "norm_type": "simplermsnorm",
    "linear_act_fun": "swish",
    "no_scale_embedding": False,
    "tie_word_embeddings": False,
}
SHAPES = {
    "tiny": Shape(
        "Llama 6M",
        {**_LLAMA_160M, "vocab_size": 8_000, "hidden_size": 256, "intermediate_size": 704}
        | {"num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "llama-160m": Shape("Llama 160M", _LLAMA_160M),
    "qwen2.5-0.5b": Shape(
        "Qwen2.5-0.5B",
        {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "chatglm3-160m": Shape(
        "ChatGLM3-like 160M", _CHATGLM3, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    ),
    "transnormer-160m": Shape(
        "TransNormer-like 160M", _TRANSNORMER, ("qkvu_proj", "out_proj", "l1", "l2", "l3")
    ),
}


def write_model(shape: Shape, vocab_size: int | None, seed: int, directory: Path) -> int:
    """A random model of this shape in fp32, and its tokenizer of decimal ids; returns its vocabulary size."""
    register_native()
    key = "padded_vocab_size" if "padded_vocab_size" in shape.config else "vocab_size"
    size = vocab_size or int(shape.config[key])
    tree = {**shape.config, key: size, "pad_token_id": pad_id(size), "eos_token_id": _mapped(100_001, size)}
    tree["bos_token_id"] = _mapped(100_000, size)
    directory.mkdir(parents=True)
    config = AutoConfig.for_model(**{k: v for k, v in tree.items() if k != "architectures"})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    _write_tokenizer(size, directory)
    return size


def write_rows(
    data: Path, tokenizer_json: Path, num_rows: int, vocab_size: int, seed: int, path: Path
) -> None:
    """`num_rows` rows drawn from `data` in the tutorial's format, as whole ids and labels of the same places.

    Real ids are folded into a smaller vocabulary here and nowhere else, for all contestants alike.
    """
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        _write_deepseek(tokenizer_json, Path(tokenizer_dir))
        chat_format = load_chat_format(tokenizer_dir, chat_format="tutorial")
        examples = ls.load_dataset(str(data), chat_format, system=SYSTEM).examples
    rows = []
    for example in random.Random(seed).sample(list(examples), num_rows):
        ids = [*example.input_ids.tolist(), int(example.labels[-1])]
        labels = [-100, *example.labels.tolist()]
        folded = [_mapped(token, vocab_size) for token in ids]
        kept = [-100 if label < 0 else _mapped(label, vocab_size) for label in labels]
        rows.append({"input_ids": folded, "labels": kept})
    path.write_text(json.dumps(rows))


def pad_id(vocab_size: int) -> int:
    """An id that no row holds, so that padding can be told from every real token."""
    return vocab_size - 1


def _mapped(token: int, vocab_size: int) -> int:
    """Ids modulo the vocabulary below its last places, which special tokens keep for themselves."""
    if vocab_size > FIRST_SPECIAL + NUM_SPECIALS:
        return token
    special = token - FIRST_SPECIAL
    plain = vocab_size - NUM_SPECIALS
    return plain + special if special >= 0 else token % plain


def _write_deepseek(tokenizer_json: Path, directory: Path) -> None:
    """As much of a DeepSeek directory as its chat format asks for."""
    config = {"model_type": "llama", "vocab_size": 102_400, "bos_token_id": 100_000, "eos_token_id": 100_001}
    named = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


def _write_tokenizer(vocab_size: int, directory: Path) -> None:
    words = {str(token): token for token in range(vocab_size)}
    pad, eos, bos = (
        str(t) for t in (pad_id(vocab_size), _mapped(100_001, vocab_size), _mapped(100_000, vocab_size))
    )
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"pad_token": pad, "eos_token": eos, "bos_token": bos, "unk_token": pad}
    config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
