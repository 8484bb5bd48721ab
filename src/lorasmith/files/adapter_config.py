"""adapter_config.json, which may come from anywhere, checked before peft acts on any of it.

peft takes what it finds: a rank of millions, a model copied a thousand times (`layer_replication`), a pattern
that never ends. Here every key is known and in range, is empty, or is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lorasmith.errors import SetupError
from lorasmith.files.adapter_dir import ADAPTER_CONFIG
from lorasmith.files.model_dir import read_json

Check: TypeAlias = Callable[[Any], bool]

LARGEST_RANK = 2**16
_LARGEST_FILE = 2**20
_LARGEST_NUMBER = 10**6
_MOST_NAMES = 4096
_LONGEST_NAME = 2000

_IGNORED = {
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
"""They name code or kernels (never followed), say who wrote the file, or go with a key that is refused."""

_REFUSED = {
    "alora_invocation_tokens": "adapters that only some tokens switch on are not run here",
    "arrow_config": "routed adapters are not run here",
    "corda_config": "it initialises from data, which a finished adapter does not need",
    "eva_config": "it initialises from data, which a finished adapter does not need",
    "kasa_config": "this kind of LoRA is not run here",
    "layer_replication": "it would build another model, of any size, out of copies of the base's layers",
    "loftq_config": "it initialises from a quantised base, which a finished adapter does not need",
    "lora_ga_config": "it initialises from data, which a finished adapter does not need",
    "megatron_config": "it names code of another framework to run",
    "monteclora_config": "this kind of LoRA is not run here",
    "use_bdlora": "this kind of LoRA is not run here",
    "use_qalora": "this kind of LoRA is not run here",
    "velora_config": "this kind of LoRA is not run here",
}


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The keys and values of `peft.LoraConfig` that the directory's adapter_config.json gives.

    Raises: SetupError naming the keys that are refused, and why; at most five of them.
    """
    path = directory / ADAPTER_CONFIG
    tree = read_json(path, most_bytes=_LARGEST_FILE, strict=True)
    kind = tree.get("peft_type")
    if kind != "LORA":
        raise SetupError(
            f"an adapter of the kind {_short(kind)} is not read here",
            where=str(path),
            why="peft_type is not LORA",
            fix="merge it with the program that made it, and use the merged model",
        )
    problems = list(filter(None, (_problem(key, value) for key, value in sorted(tree.items()))))
    if tree.get("r") in (None, False):
        problems.append("r: it is missing")
    if problems:
        raise SetupError(
            f"{ADAPTER_CONFIG} asks for what is refused here",
            where=str(path),
            why=several(problems),
            fix="get the adapter from a source you trust; keys that only matter to its training "
            "(a *_config, init_lora_weights) can be set to null",
        )
    return {key: value for key, value in tree.items() if key in _CHECKS and value is not None}


def several(items: list[str]) -> str:
    """The first five, and how many more there are."""
    more = f", and {len(items) - 5:,} more" if len(items) > 5 else ""
    return "; ".join(items[:5]) + more


def _problem(key: str, value: Any) -> str | None:
    is_empty = value is None or value is False or value in ("", [], {})
    if is_empty or key in _IGNORED:
        return None
    if key in _REFUSED:
        return f"{key}: {_REFUSED[key]}"
    if key not in _CHECKS:
        return f"{_short(key)}: this key is not known here"
    check, rule = _CHECKS[key]
    return None if check(value) else f"{key}: it must be {rule}, not {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= _LARGEST_NUMBER  # false for NaN too


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_is_name, value))


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_index, value))


def _is_init(value: Any) -> bool:
    plain = ("gaussian", "orthogonal", "olora", "pissa")
    return isinstance(value, bool) or value in plain or bool(re.fullmatch(r"pissa_niter_\d{1,2}", str(value)))


def _table_of(check: Check) -> Check:
    def checks(value: Any) -> bool:
        if not isinstance(value, Mapping) or len(value) > _MOST_NAMES:
            return False
        return all(_is_name(name) and check(item) for name, item in value.items())

    return checks


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_FLAG = (_is_bool, "true or false")
_NAMES = (_either(_is_name, _are_names), f"a regex or at most {_MOST_NAMES:,} names")
_RANK = f"a whole number from 1 to {LARGEST_RANK:,}"
_NUMBER = f"a number of at most {_LARGEST_NUMBER:,}"

_CHECKS: Mapping[str, tuple[Check, str]] = {
    "base_model_name_or_path": (_is_name, "a name"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    "r": (_is_rank, _RANK),
    "lora_alpha": (_is_number, _NUMBER),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (_is_init, "true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N"),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": (_either(_is_index, _are_indices), "indices of layers"),
    "modules_to_save": (_are_names, f"at most {_MOST_NAMES:,} names"),
    "target_parameters": (_are_names, f"at most {_MOST_NAMES:,} names"),
    "rank_pattern": (_table_of(_is_rank), f"names, each with {_RANK}"),
    "alpha_pattern": (_table_of(_is_number), f"names, each with {_NUMBER}"),
    "trainable_token_indices": (_either(_are_indices, _table_of(_are_indices)), "ids of tokens"),
}
"""What reaches peft: the check of each value, and the rule in words."""
