"""The composition root of what leaves the house: a run in, files for other programs out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from lorasmith.config import AdapterForm, Dtype, MergeLayout
from lorasmith.errors import ConfigError
from lorasmith.exporting.convert import convert
from lorasmith.exporting.merge import merge as merge_directories
from lorasmith.families.opening import open_chat
from lorasmith.files.adapter_dir import ChatSettings, is_adapter_dir, read_chat_settings
from lorasmith.hub.download import resolve
from lorasmith.model.dtype import DTYPES
from lorasmith.model.load import read_model_config
from lorasmith.runs.run_dir import adapter_of
from lorasmith.storage import Storage
from lorasmith.text.template import ChatFormat

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def merge(
    run_or_adapter: str | Path,
    *,
    output_dir: str | Path,
    layout: MergeLayout = "original",
    dtype: Dtype | None = None,
    base: str | None = None,
    checkpoint: int | None = None,
    storage: Storage | None = None,
) -> Path:
    """A run, or any PEFT adapter directory, merged into its base: a model directory that needs no adapter.

    layout "original" keeps the base's class, names and small files; "native" writes Baichuan2-7B as
    LlamaForCausalLM and ChatGLM3 as GlmForCausalLM, with a fast tokenizer, and takes a bare base model too.
    `dtype` None: that of the base. `base` replaces the base model that the adapter names. merge.json in the
    result says how near its logits are to the adapter's. Runs on the CPU.

    Raises: ConfigError for a layout that this model does not have; SetupError for content in `output_dir` and
    for a result that does not answer as the adapter does; CheckpointError; TokenizerError; StorageError.
    """
    _require_one_of("layout", layout, get_args(MergeLayout))
    if dtype is not None:
        _require_one_of("dtype", dtype, get_args(Dtype))
    source, target = Path(run_or_adapter), Path(output_dir)
    is_adapter = is_adapter_dir(source)
    adapter = adapter_of(source, checkpoint) if is_adapter else None
    named = base or (None if is_adapter else str(run_or_adapter))
    chat = _settings(source, named)
    directory = resolve(named) if named else resolve(chat.base, hub=chat.hub, revision=chat.revision)
    merge_directories(
        directory,
        adapter,
        target,
        layout=layout,
        dtype=DTYPES.get(dtype or "auto"),
        chat_format=_chat_format(directory, chat),
        storage=storage or Storage(),
    )
    return target


def convert_adapter(
    adapter: str | Path,
    *,
    to: AdapterForm,
    output_dir: str | Path,
    base: str | None = None,
    new_base: str | None = None,
    storage: Storage | None = None,
) -> Path:
    """An adapter over W_pack or query_key_value as one over q, k and v of the native layout, and back; exact.

    `base` is the model it was trained on, by default the one it names; of it only config.json is read.
    `new_base` is written as the name of the model that the result belongs to.

    Raises: ConfigError for an adapter that is not plain LoRA or has nothing to convert; SetupError for one
    that does not fit `base`, and for content in `output_dir`; StorageError.
    """
    _require_one_of("to", to, get_args(AdapterForm))
    source, target = Path(adapter), Path(output_dir)
    config = read_model_config(resolve(base or read_chat_settings(source).base))
    files = storage or Storage()
    convert(adapter_of(source, None), config, target, to=to, new_base=new_base, storage=files)
    return target


def _settings(source: Path, base: str | None) -> ChatSettings:
    """How the source is talked to; with `base` an adapter need not name one."""
    if base is not None and not (source / "chat_format.json").exists():
        return ChatSettings(base)
    return read_chat_settings(source)


def _chat_format(directory: Path, chat: ChatSettings) -> ChatFormat | None:
    """None for a base without a tokenizer, whose weights are merged all the same."""
    if not any((directory / name).exists() for name in _TOKENIZERS):
        return None
    return open_chat(directory, chat.family, chat.chat_format)[1]


def _require_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key} is {value!r}", fix=f"choose one of: {', '.join(known)}")
