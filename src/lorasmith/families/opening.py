"""A model directory's small files -> its family and chat format; no weights, no torch."""

from __future__ import annotations

from pathlib import Path

from lorasmith.families import checked_tokenizer, find_family, stop_ids_of
from lorasmith.families.base import Family
from lorasmith.files.model_config import read_generation_json, read_model_json
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat


def open_family(directory: Path, name: str = "auto") -> Family:
    """Raises: SetupError without config.json; FamilyError if no family fits it."""
    return find_family(read_model_json(directory), name)


def open_chat(
    directory: Path, family: str = "auto", chat_format: str = "official"
) -> tuple[Family, ChatFormat]:
    """The family, and how it writes conversations with this directory's tokenizer, canary checked.

    Raises: SetupError, FamilyError, TokenizerError, ConfigError.
    """
    found = open_family(directory, family)
    tokenizer = checked_tokenizer(found, load_tokenizer(directory, found.special_pieces))
    stop_ids = stop_ids_of(read_generation_json(directory))
    return found, found.chat_format(chat_format, tokenizer, stop_ids)


def context_length(directory: Path) -> int | None:
    """Tokens that the model was made for, by the names that config.json files use for it."""
    tree = read_model_json(directory)
    names = ("max_position_embeddings", "seq_length", "model_max_length", "n_positions")
    return next((int(tree[name]) for name in names if tree.get(name)), None)
