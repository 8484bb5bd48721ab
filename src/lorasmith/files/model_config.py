"""config.json of a model directory, which may come from anywhere: what it says is of the kind it must be.

Families and transformers take it as it comes: a text where a table should be ends in an error of Python's,
and a billion of layers in no memory at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.errors import SetupError
from lorasmith.files.model_dir import read_json

MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_MOST = 10_000
_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"),
    "num_labels",
)
"""What a model has one after the other: each takes memory and time of its own, even without weights."""
_LARGEST = 2**40
"""Of any whole number: a size beyond it fits no machine, and an id no vocabulary."""


def read_model_json(directory: Path) -> dict[str, Any]:
    """config.json, checked as far as it is read here; `auto_map` is never followed.

    Raises: SetupError without a readable config.json, or naming a key whose value cannot be meant.
    """
    path = directory / MODEL_CONFIG
    tree = read_json(path)
    problems = [f"{key} must be {rule}" for key, (check, rule) in _CHECKS.items() if not check(tree.get(key))]
    problems += [
        f"{key} must be a whole number up to {_MOST:,}" for key in _COUNTS if not _is_count(tree, key)
    ]
    problems += [f"{key[:60]} is too large" for key, value in tree.items() if not _fits(value)]
    if problems:
        raise _unfit(path, problems[0])
    return tree


def read_generation_json(directory: Path) -> dict[str, Any]:
    """generation_config.json; empty without one.

    Raises: SetupError if it cannot be read, or its eos_token_id is neither an id nor a list of them.
    """
    path = directory / GENERATION_CONFIG
    tree = read_json(path) if path.exists() else {}
    if not _are_ids(tree.get("eos_token_id")):
        raise _unfit(path, "eos_token_id must be an id or a list of ids")
    return tree


def _is_count(tree: dict[str, Any], key: str) -> bool:
    value = tree.get(key)
    return value is None or isinstance(value, list) or (_is_whole(value) and value <= _MOST)


def _fits(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) <= _LARGEST


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_table(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_size(value: Any) -> bool:
    return value is None or _is_whole(value)


def _are_ids(value: Any) -> bool:
    return _is_size(value) or (isinstance(value, list) and all(map(_is_whole, value)))


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (_is_text, "a text"),
    "architectures": (_are_texts, "a list of texts"),
    "rope_parameters": (_is_table, "a table"),
    "rope_scaling": (_is_table, "a table"),
    "eos_token_id": (_are_ids, "an id or a list of ids"),
    **dict.fromkeys(
        (
            *("vocab_size", "padded_vocab_size", "max_position_embeddings"),
            *("seq_length", "n_positions", "model_max_length"),
        ),
        (_is_size, "a whole number"),
    ),
}


def _unfit(path: Path, why: str) -> SetupError:
    fix = "get this file again from the model's own source"
    return SetupError(f"{path.name} cannot be used", where=str(path), why=why, fix=fix)
