"""Files as a stranger could send them: good ones, what becomes of them, and who reads them here."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers_factory
import torch
from hypothesis import strategies as st
from modules import KINDS, tiny_module
from safetensors.torch import save
from transformers import LlamaConfig

from lorasmith.adapters.check import checked_adapter
from lorasmith.adapters.lora import quiet_peft
from lorasmith.doctor.model_files import code_check, weights_check
from lorasmith.errors import LorasmithError
from lorasmith.evaluation.golden import Golden, GoldenPrompt, read_golden
from lorasmith.families.opening import context_length, open_family
from lorasmith.files.adapter_config import read_adapter_config
from lorasmith.files.adapter_dir import ChatSettings, read_chat_settings
from lorasmith.files.model_config import read_generation_json
from lorasmith.files.tensor_header import read_header
from lorasmith.hub.download import resolve
from lorasmith.model.load import empty_module, read_model_config
from lorasmith.runs.manifest import (
    FORMAT,
    STATE,
    TrainState,
    damage,
    json_bytes,
    manifest_bytes,
    newest_checkpoint,
    read_state,
)
from lorasmith.text.loading import load_tokenizer

STEP = "run/checkpoints/step-000003"
WEIGHTS = "adapter/adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SECONDS = 1.0


@dataclass(frozen=True)
class Reader:
    """Who reads `file` of the place that `furnish` makes."""

    file: str
    read: Callable[[Path], object]


def named_base(directory: Path) -> object:
    """As chat, merge and verify find the base; a hub is not asked."""
    return resolve(read_chat_settings(directory).base, local_files_only=True)


def checkpoint(path: Path) -> object:
    newest_checkpoint(path.parents[1])
    damage(path, hashes=False)
    return damage(path)


def opened(directory: Path) -> object:
    family = open_family(directory)
    return family, context_length(directory), code_check(directory)


READERS = {
    "header": Reader(WEIGHTS, lambda p: read_header(p / WEIGHTS)),
    "shard": Reader("model/model.safetensors", lambda p: weights_check(p / "model")),
    "index": Reader("model/model.safetensors.index.json", lambda p: weights_check(p / "model")),
    "adapter settings": Reader("adapter/adapter_config.json", lambda p: read_adapter_config(p / "adapter")),
    "adapter's base": Reader("adapter/adapter_config.json", lambda p: named_base(p / "adapter")),
    "chat settings": Reader("run/chat_format.json", lambda p: named_base(p / "run")),
    "family": Reader("model/config.json", lambda p: opened(p / "model")),
    "model": Reader("model/config.json", lambda p: read_model_config(p / "model")),
    "generation": Reader("model/generation_config.json", lambda p: read_generation_json(p / "model")),
    "tokenizer": Reader("model/tokenizer_config.json", lambda p: load_tokenizer(p / "model")),
    "special tokens": Reader("model/special_tokens_map.json", lambda p: load_tokenizer(p / "model")),
    "manifest": Reader(f"{STEP}/MANIFEST.json", lambda p: checkpoint(p / STEP)),
    "state": Reader(f"{STEP}/state.json", lambda p: checkpoint(p / STEP)),
    "state alone": Reader(f"{STEP}/state.json", lambda p: read_state(p / STEP)),
    "golden": Reader("run/golden.json", lambda p: read_golden(p / "run")),
}  # fmt: skip


def fits(adapter: Path) -> object:
    """All that stands before peft loads an adapter, over a base that is names and shapes only."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = empty_module(LlamaConfig(vocab_size=16, **sizes))
    with quiet_peft():
        return checked_adapter(base, adapter)


SLOW_READERS = {
    "adapter over a base": Reader("adapter/adapter_config.json", lambda p: fits(p / "adapter")),
    "its weights over a base": Reader(WEIGHTS, lambda p: fits(p / "adapter")),
    **{
        f"model {kind}": Reader(f"{kind}/config.json", lambda p, kind=kind: read_model_config(p / kind))
        for kind in KINDS
    },
}
"""Those that call libraries at length."""


def furnish(root: Path) -> Path:
    """Good files for every reader."""
    tokenizers_factory.deepseek_like(root / "model")
    for name in ("adapter", STEP, *KINDS):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, content in good_files().items():
        (root / name).write_bytes(content)
    return root


@cache
def good_files() -> dict[str, bytes]:
    state = {
        "format": FORMAT,
        **asdict(TrainState(step=3, recent_losses=(1.0, 0.5), depends_on={"lora.r": 8})),
    }
    inside = {"adapter_config.json": b"{}", STATE: json_bytes(state)}
    weights = save({A: torch.ones(4, 8), A.replace("_A", "_B"): torch.ones(8, 4)})
    prompt = GoldenPrompt(({"role": "user", "content": "a"},), (1, 2), (3,), (1.0,), (0.5,), (4,), "b")
    golden = Golden(
        (prompt,), "llama3", "official", "0", {"tokenizer.json": "0"}, "fp32", "cpu", {"torch": "2"}
    )
    specials = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": {"content": "<｜end▁of▁sentence｜>"}}
    trees: dict[str, Any] = {
        "adapter/adapter_config.json": {
            "peft_type": "LORA",
            "r": 4,
            "target_modules": ["q_proj"],
            "lora_alpha": 8,
            "base_model_name_or_path": "no/base",
            "alpha_pattern": {"q_proj": 4},
        },
        "run/chat_format.json": asdict(ChatSettings("no/base", system="Be brief.")),
        "run/golden.json": {"format": 1, **asdict(golden)},
        "model/config.json": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 102400,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "eos_token_id": [1, 2],
            "bos_token_id": 0,
            "max_position_embeddings": 128,
            "intermediate_size": 64,
        },
        "model/generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.7},
        "model/special_tokens_map.json": specials,
        "model/tokenizer_config.json": {
            **specials,
            "added_tokens_decoder": {"0": {"content": specials["bos_token"], "special": True}},
            "additional_special_tokens": ["<y>"],
            "extra_special_tokens": {"z": "<z>"},
            "chat_template": [{"name": "tool_use", "template": "{{ messages }}"}],
        },
        "model/model.safetensors.index.json": {"weight_map": {A: "model.safetensors"}},
    }
    trees |= {f"{kind}/config.json": tiny_module(kind, torch.float32).config.to_dict() for kind in KINDS}
    files = {name: json.dumps(tree, ensure_ascii=False).encode() for name, tree in trees.items()}
    files |= {f"{STEP}/{name}": content for name, content in inside.items()}
    files[f"{STEP}/MANIFEST.json"] = manifest_bytes(inside, {"lora.r": 8})
    files[WEIGHTS] = files["model/model.safetensors"] = weights
    return files


def reads_or_refuses(read: Callable[[], object], *, seconds: float = SECONDS) -> str:
    """What became of it: "read", or the class of our own error. All else fails the test."""
    began = time.process_time()
    try:
        read()
        told, ended = "read", "read"
    except LorasmithError as error:
        told, ended = str(error), type(error).__name__
    took = time.process_time() - began
    assert told.encode("utf-8")
    assert took < seconds, f"it took {took:.1f} s"
    return ended


_WATCHED: list[tuple[Path, list[str]]] = []
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHED or (event != "open" and event not in _CHANGES):
        return
    root, seen = _WATCHED[-1]
    path = (
        os.path.abspath(os.fsdecode(arguments[0]))
        if isinstance(arguments[0], str | bytes | os.PathLike)
        else ""
    )
    is_ours = path.startswith((str(root), sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])))
    if path and not is_ours and not path.startswith(("/proc/", os.devnull)):  # which a subprocess opens
        seen.append(f"{event} {path}")


sys.addaudithook(_watch)


@contextmanager
def nothing_outside(root: Path) -> Iterator[None]:
    """No file but those of `root`, and of Python's own libraries, is opened or changed in the block."""
    _WATCHED.append((root, []))
    try:
        yield
    finally:
        _, seen = _WATCHED.pop()
    assert not seen, seen


# What a stranger may write

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), 0.5, True]
)
TEXTS = st.sampled_from(
    [
        *("", "a", "a" * 5000, "\ud800", "\x00", "\u202e", "(a+)+$", "{{", "<｜a｜>"),
        *("../../etc/passwd", "/etc/passwd", "~nobody/x"),
    ]
)
LEAVES = st.none() | NUMBERS | TEXTS | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def written(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@st.composite
def changed_tree(draw: st.DrawFn, good: bytes) -> bytes:
    """The good tree with one to three of its values, at any depth, another; or a key too many or too few."""
    tree = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(["change", "change", "remove", "add"]))
            if action == "remove":
                del node[key]
            elif action == "add" and isinstance(node, dict):
                node[draw(TEXTS)] = draw(VALUES)
            else:
                node[key] = draw(VALUES)
            break
    return written(tree)


@st.composite
def changed_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Cut, flipped, or with something put in."""
    place = draw(st.integers(0, len(good) - 1))
    kind = draw(st.sampled_from(["cut", "flip", "put in", "behind"]))
    if kind == "cut":
        return good[:place]
    if kind == "flip":
        return good[:place] + bytes([good[place] ^ draw(st.integers(1, 255))]) + good[place + 1 :]
    extra = draw(
        st.binary(min_size=1, max_size=9) | st.sampled_from([b'"a":1,', b"\xff\xfe", b"\xed\xa0\x80", b"//"])
    )
    return good + extra if kind == "behind" else good[:place] + extra + good[place:]


def json_files(good: bytes) -> st.SearchStrategy[bytes]:
    whole = st.binary(max_size=40) | VALUES.map(written) | st.sampled_from([deep(50), deep(300), deep(10**5)])
    twice = st.sampled_from(list(json.loads(good))).map(
        lambda key: b"{" + written(key) + b":1," + good.strip()[1:]
    )
    return changed_tree(good) | changed_tree(good) | changed_bytes(good) | whole | twice


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """A header of near-right entries, a length that may lie, and data that may not fit."""
    good = save({"a": torch.ones(2, 3), "b/../c": torch.ones(4), "empty": torch.ones(0, 3)})
    if draw(st.booleans()):
        return draw(changed_bytes(good))
    (length,) = struct.unpack("<Q", good[:8])
    header = draw(
        changed_tree(good[8 : 8 + length]) | VALUES.map(written) | st.sampled_from([deep(300), b"{}", b""])
    )
    said = draw(st.sampled_from([len(header)] * 4 + [0, 7, len(header) + 1, 2**40, 2**63, 2**64 - 1]))
    data = draw(st.sampled_from([good[8 + length :]] * 3 + [b"", b"\x00" * 7, good]))
    return struct.pack("<Q", said) + header + data


def files_for(reader: Reader) -> st.SearchStrategy[bytes]:
    if reader.file.endswith(".safetensors"):
        return tensor_files()
    return json_files(good_files()[reader.file])
