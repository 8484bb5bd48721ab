"""An adapter and its base -> one model directory, proved equal before it appears."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from lorasmith.adapters.lora import load_adapter
from lorasmith.errors import ConfigError
from lorasmith.exporting.fast_tokenizer import require_equal_ids, tokenizer_files
from lorasmith.exporting.layout import NativeLayout, native_layout
from lorasmith.exporting.native import native_module
from lorasmith.exporting.proof import (
    allowed_difference,
    largest_difference,
    logits_of,
    random_rows,
    require_equal,
)
from lorasmith.exporting.staging import keep_golden, refuse_content, staged
from lorasmith.files.adapter_dir import GOLDEN_FILE
from lorasmith.files.model_dir import read_json, read_json_if_there
from lorasmith.model.load import load_base, module_dtype, read_model_config, without_progress_bar
from lorasmith.storage import Storage
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer

RECORD_FILE = "merge.json"
_SHARD = "5GB"
_CPU = torch.device("cpu")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
_OWN_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("max_new_tokens", "max_length", "pad_token_id", "bos_token_id"),
)


@dataclass(frozen=True)
class MergeRecord:
    """What was merged and how near it came; merge.json beside the weights."""

    base: str
    adapter: str | None
    layout: str
    architecture: str
    dtype: str
    max_logit_difference: float
    """Merged and loaded again, against the adapter over its base."""
    allowed_difference: float
    moved: float
    """How far the adapter moves the base's logits: a difference as large as this has lost the adapter."""
    tokenizer: str
    """"copied", "converted" or "none"."""


def merge(
    base: Path,
    adapter: Path | None,
    output_dir: Path,
    *,
    layout: str,
    dtype: torch.dtype | None,
    chat_format: ChatFormat | None,
    storage: Storage,
) -> MergeRecord:
    """Weights, config and tokenizer of `base` with `adapter` in them, in `output_dir`, which must be empty.

    Sums in fp32, one matrix at a time, and rounds once: to `dtype`, or to what the base is stored in. With
    layout "native" `adapter` may be None. `chat_format` is the base's, None if it has no tokenizer.

    Raises: ConfigError for a layout that this base does not have; SetupError for content in `output_dir`, and
    if the merged model does not answer as the adapter does; TokenizerError; StorageError.
    """
    refuse_content(output_dir)
    config = read_model_config(base)
    route = native_layout(config) if layout == "native" else None
    if adapter is None and route is None:
        fix = "name a run or an adapter directory"
        raise ConfigError("there is nothing to merge: this is a base model", where=str(base), fix=fix)
    stored = stored_dtype(base, config)
    needed = _weight_bytes(base, stored, dtype or stored)
    with staged(storage, output_dir, needed=needed) as folder:
        model = load_base(base, config, torch.promote_types(stored, dtype or stored), _CPU)
        record = _write(_Task(base, adapter, route, dtype or stored, chat_format), model, folder)
        text = json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n"
        storage.create(folder / RECORD_FILE, text.encode())
        keep_golden(storage, adapter or base, folder)
    return record


@dataclass(frozen=True)
class _Task:
    base: Path
    adapter: Path | None
    route: NativeLayout | None
    """None: the original layout."""
    dtype: torch.dtype
    chat_format: ChatFormat | None


def _write(task: _Task, model: PreTrainedModel, folder: Path) -> MergeRecord:
    rows = random_rows(model.config.vocab_size)
    before = logits_of(model, rows)
    tuned = load_adapter(model, task.adapter) if task.adapter else model
    expected = logits_of(tuned, rows)
    tokenizer = _save(task, merge_weights(tuned, task.dtype), folder)
    written = load_base(folder, read_model_config(folder), task.dtype, _CPU)
    difference = largest_difference(logits_of(written, rows), expected)
    allowed = allowed_difference(expected, task.dtype)
    require_equal(difference, allowed)
    return MergeRecord(
        base=str(task.base),
        adapter=str(task.adapter) if task.adapter else None,
        layout="native" if task.route else "original",
        architecture=read_json(folder / "config.json").get("architectures", [type(written).__name__])[0],
        dtype=_OWN_NAMES[task.dtype],
        max_logit_difference=difference,
        allowed_difference=allowed,
        moved=largest_difference(expected, before),
        tokenizer=tokenizer,
    )


def merge_weights(model: peft.PeftModel | PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights, in place: each sum in fp32, rounded to `dtype`."""
    if not isinstance(model, peft.PeftModel):
        plain: PreTrainedModel = model.to(dtype)
        return plain
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        layer.get_base_layer().float()
        layer.merge()
        layer.get_base_layer().to(dtype)
    merged: PreTrainedModel = model.unload().to(dtype)
    return merged.eval()


def stored_dtype(base: Path, config: PretrainedConfig) -> torch.dtype:
    """What config.json says (dtype or torch_dtype), else the dtype of a tensor in the file, else fp32."""
    if config.dtype in _OWN_NAMES:
        return config.dtype  # type: ignore[no-any-return]
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                return _DTYPES.get(file.get_slice(name).get_dtype(), torch.float32)
    return torch.float32


def _weight_bytes(base: Path, stored: torch.dtype, dtype: torch.dtype) -> int:
    """What the merged weights will take on the disk, from the sizes of the base's files."""
    kinds = ([p.stat().st_size for p in base.glob(f"*{kind}")] for kind in (".safetensors", ".bin"))
    size = next((sum(sizes) for sizes in kinds if sizes), 0)
    return size * dtype.itemsize // stored.itemsize


def _save(task: _Task, merged: PreTrainedModel, folder: Path) -> str:
    """Weights and small files; returns what became of the tokenizer."""
    if task.route is None:
        _save_weights(merged, folder)
        _copy_small_files(task.base, folder, task.dtype)
        return "copied" if task.chat_format else "none"
    native = native_module(merged, task.route, task.chat_format.stop_ids if task.chat_format else ())
    settings = read_json_if_there(task.base / "generation_config.json")
    kept = {key: settings[key] for key in _SAMPLING if key in settings}
    native.generation_config = GenerationConfig(**kept, eos_token_id=native.config.eos_token_id)
    _save_weights(native, folder)
    return _convert_tokenizer(folder, task.route, task.chat_format)


def _save_weights(module: PreTrainedModel, folder: Path) -> None:
    """Shards; `module` is emptied, since they are loaded again next and two of it may not fit."""
    module.config.dtype = module_dtype(module)
    with without_progress_bar():
        module.save_pretrained(folder, max_shard_size=_SHARD)
    module.to("meta")


def _copy_small_files(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Byte for byte, over what transformers wrote; only a changed dtype changes a line of config.json."""
    for path in sorted(base.iterdir()):
        left = path.name.endswith(".index.json") or path.name == GOLDEN_FILE or path.name[0] == "."
        if path.is_file() and path.suffix not in _WEIGHTS and not left:
            shutil.copyfile(path, folder / path.name)
    tree, name = read_json(base / "config.json"), str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in tree]
    if any(tree[key] != name for key in keys):
        text = json.dumps(tree | dict.fromkeys(keys, name), indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _convert_tokenizer(folder: Path, route: NativeLayout, chat_format: ChatFormat | None) -> str:
    """Raises: TokenizerError if the converted one gives other prompts."""
    if chat_format is None or not isinstance(chat_format.tokenizer, SentencePieceTokenizer):
        return "none"
    official = chat_format.name == "official"
    files = tokenizer_files(chat_format.tokenizer, route.chat_template if official else None)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if official:
        require_equal_ids(folder, chat_format)
    return "converted"
