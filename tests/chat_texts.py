"""The formats that every law of chat is checked on, with small vocabularies and with the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sentencepiece_factory as pieces
import tokenizers_factory as factory

from lorasmith.families import all_families, find_family
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat

LIKE: dict[str, Callable[[Path], Path]] = {
    "llama3": factory.llama3_like,
    "deepseek": factory.deepseek_like,
    "baichuan2": pieces.baichuan2_like,
    "chatglm3": pieces.chatglm3_like,
    "transnormer": pieces.transnormer_like,
}
GENERIC: dict[str, Callable[[Path], Path]] = {
    "chatml": factory.chatml,
    "chatml-generation": lambda path: factory.chatml(path, factory.CHATML_GENERATION),
    "gemma": factory.gemma_like,
    "llama2-legacy": factory.llama2_like,
    "llama2-first": lambda path: factory.llama2_like(path, "first"),
    "llama2-always": lambda path: factory.llama2_like(path, "always"),
    "marked": factory.marked,
}
BY_TEMPLATE: dict[str, Callable[[Path], Path]] = {"glm4": factory.glm4_like, "qwen3": factory.qwen3_like}
"""Families that read or follow the chat template of a transformers tokenizer, and have no tutorial."""
FORMATS = [
    *((family, name) for family in LIKE for name in ("official", "tutorial")),
    *((template, "official") for template in (*GENERIC, *BY_TEMPLATE)),
]
REAL = {
    "llama3": "llama3/tokenizer.rebuilt.json",
    "deepseek": "deepseek-llm/tokenizer.rebuilt.json",
    "baichuan2": "baichuan2/tokenizer.model",
    "chatglm3": "chatglm3/tokenizer.model",
    "transnormer": "baichuan1_transnormer/tokenizer.rebuilt.model",
}
"""Where the reference data has each family's vocabulary."""


def make_format(directory: Path, family: str, name: str) -> ChatFormat:
    write = {**LIKE, **GENERIC, **BY_TEMPLATE}[family]
    families = {known.name: known for known in all_families()}
    found = families.get(family, families["generic"])
    return found.chat_format(name, load_tokenizer(write(directory), found.special_pieces))


def real_directory(shared: Path, directory: Path, family: str) -> Path:
    """A directory with the family's real vocabulary, under the name that model directories give it."""
    source = shared / "data/tokenizers" / REAL[family]
    (directory / f"tokenizer{source.suffix}").symlink_to(source)
    return directory


def real_format(shared: Path, directory: Path, family: str, name: str) -> ChatFormat:
    found = find_family({}, family)
    tokenizer = load_tokenizer(real_directory(shared, directory, family), found.special_pieces)
    return found.chat_format(name, tokenizer)
