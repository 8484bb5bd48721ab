"""What lies in an adapter directory, by name, and what its small files say. A run directory is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.errors import SetupError
from lorasmith.files.model_dir import read_json, unreadable
from lorasmith.json_file import as_record

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER_WEIGHTS = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_FORMAT_FILE = "chat_format.json"
GOLDEN_FILE = "golden.json"
"""What the adapter said when its training ended; it goes along with whatever is made of the adapter."""

_LARGEST_FILE = 2**20
_LONGEST_NAME = 4000


@dataclass(frozen=True)
class ChatSettings:
    """What chat, serve and merge need to know of a run: the content of chat_format.json."""

    base: str
    """The base model: a hub name or a directory."""
    family: str = "auto"
    chat_format: str = "official"
    system: str | None = None
    hub: str = "huggingface"
    revision: str | None = None


def is_adapter_dir(path: Path) -> bool:
    """A run, finished or not, or any PEFT adapter directory."""
    return any((path / name).exists() for name in (ADAPTER_CONFIG, CHAT_FORMAT_FILE))


def read_chat_settings(path: Path) -> ChatSettings:
    """Of a run; an adapter from elsewhere says only its base model.

    Raises: SetupError if the base model is not named, or the file that should name it is damaged.
    """
    if (path / CHAT_FORMAT_FILE).exists():
        return _chat_settings(path / CHAT_FORMAT_FILE)
    tree = read_json(path / ADAPTER_CONFIG, most_bytes=_LARGEST_FILE, strict=True)
    base = tree.get("base_model_name_or_path")
    if not base:
        raise SetupError(
            "this adapter does not say which base model it belongs to",
            where=str(path / ADAPTER_CONFIG),
            fix="give the base model's directory, and the adapter with --adapter",
        )
    if not isinstance(base, str) or len(base) > _LONGEST_NAME:
        raise unreadable(path / ADAPTER_CONFIG, "base_model_name_or_path is no name")
    return ChatSettings(base=base)


def _chat_settings(path: Path) -> ChatSettings:
    try:
        found = as_record(ChatSettings, read_json(path, most_bytes=_LARGEST_FILE, strict=True))
        if not 0 < len(found.base) <= _LONGEST_NAME:
            raise ValueError("base is no name")
    except ValueError as error:
        raise unreadable(path, str(error)) from None
    return found


def settings_asked(path: str, adapter: str | None, hub: str, revision: str | None) -> ChatSettings:
    """How to open what a person names: a run by its own settings, a base model by the settings of the adapter
    that is put on it, or by none."""
    if is_adapter_dir(Path(path)):
        own = read_chat_settings(Path(path))
        return replace(own, revision=revision or own.revision)
    if adapter is not None and is_adapter_dir(Path(adapter)):
        return replace(read_chat_settings(Path(adapter)), base=path, hub=hub, revision=revision)
    return ChatSettings(path, hub=hub, revision=revision)
