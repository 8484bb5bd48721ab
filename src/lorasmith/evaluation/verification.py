"""A run, an adapter or a merged directory, loaded, and its golden prompts replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorasmith.adapters.lora import load_adapter
from lorasmith.config import Dtype
from lorasmith.errors import FamilyError, LorasmithError, SetupError
from lorasmith.evaluation.golden import (
    Golden,
    base_fingerprint,
    installed_versions,
    read_golden,
    tokenizer_fingerprint,
)
from lorasmith.evaluation.replay import Outcome, PromptReport, Replay, replay
from lorasmith.families.base import Family
from lorasmith.families.opening import open_chat, open_family
from lorasmith.files.adapter_dir import GOLDEN_FILE, ChatSettings, is_adapter_dir, read_chat_settings
from lorasmith.files.model_dir import read_json_if_there
from lorasmith.hub.download import resolve
from lorasmith.model.dtype import DTYPE_NAMES, DTYPES, resolve_device, resolve_dtype
from lorasmith.model.load import hidden_size, load_base
from lorasmith.model.plugin_classes import family_config
from lorasmith.runs.run_dir import adapter_of
from lorasmith.text.template import ChatFormat

_MERGED = "merge.json"


@dataclass(frozen=True)
class Setting:
    """Where and with what something was said."""

    dtype: str
    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Verification:
    """What `lorasmith verify` tells. Differences in files or versions explain; ids and logits decide."""

    outcome: Outcome
    allowed: float
    """The largest difference, of the largest logit, that rounding of the weights explains."""
    effect: float | None
    """Share of the adapter's own effect on the logits that is still there."""
    prompts: tuple[PromptReport, ...]
    base_equal: bool | None
    """None for a merged directory: its weights are no longer the base's."""
    tokenizer_changes: tuple[str, ...]
    """Files of the tokenizer that are not the recorded ones."""
    chat_format_problem: str | None
    """Why the prompts could not be written anew; the recorded ids were replayed."""
    recorded: Setting
    here: Setting


def verify(path: Path, *, base: str | None, dtype: Dtype | None, device: str) -> Verification:
    """See `lorasmith.api.verify`."""
    golden = read_golden(path)
    adapter = adapter_of(path, None) if is_adapter_dir(path) else None
    directory = _base_of(path, base) if adapter else path
    on = resolve_device(device)
    module = _load(directory, golden.family, dtype or golden.dtype, on)
    _require_ids(golden, module, path)
    name = DTYPE_NAMES[module.dtype]
    fingerprint = base_fingerprint(module) if adapter else None
    chat_format, problem = _chat_format(directory, golden)
    found = replay(
        golden,
        load_adapter(module, adapter) if adapter else module,
        chat_format=chat_format,
        dtypes=[name, *_stored_in(directory)],
    )
    return _verification(
        found,
        golden,
        base_equal=None if fingerprint is None else fingerprint == golden.base,
        changes=_changes(golden, directory),
        problem=problem,
        here=Setting(name, on.type, installed_versions()),
    )


def _verification(
    found: Replay,
    golden: Golden,
    *,
    base_equal: bool | None,
    changes: tuple[str, ...],
    problem: str | None,
    here: Setting,
) -> Verification:
    return Verification(
        outcome=found.outcome,
        allowed=found.allowed,
        effect=found.effect,
        prompts=found.prompts,
        base_equal=base_equal,
        tokenizer_changes=changes,
        chat_format_problem=problem,
        recorded=Setting(golden.dtype, golden.device, golden.versions),
        here=here,
    )


def _base_of(adapter: Path, base: str | None) -> Path:
    chat = ChatSettings(base) if base else read_chat_settings(adapter)
    return resolve(chat.base, hub=chat.hub, revision=chat.revision)


def _family(directory: Path, recorded: str) -> Family:
    """The recorded one, unless it came by a plug-in that is not here."""
    try:
        return open_family(directory, recorded)
    except FamilyError:
        return open_family(directory)


def _load(directory: Path, family: str, dtype: str, on: torch.device) -> PreTrainedModel:
    """In the recorded dtype; fp16 weights, which no CPU computes with, are widened."""
    config = family_config(directory, _family(directory, family))
    if dtype == "auto":
        wanted = resolve_dtype("auto", on, hidden_size(config))
    else:
        wanted = torch.float32 if dtype == "fp16" and on.type == "cpu" else DTYPES[dtype]
    return load_base(directory, config, wanted, on)


def _chat_format(directory: Path, golden: Golden) -> tuple[ChatFormat | None, str | None]:
    """The recorded family's; a native layout has other tokenizer files, and is of the family they make it."""
    if golden.chat_format is None:
        return None, "the run was trained on ids, without a tokenizer"
    try:
        return open_chat(directory, golden.family, golden.chat_format)[1], None
    except LorasmithError:
        try:
            return open_chat(directory)[1], None
        except LorasmithError as error:
            return None, error.what


def _stored_in(directory: Path) -> list[str]:
    """The dtype that a merge rounded to."""
    dtype = read_json_if_there(directory / _MERGED).get("dtype")
    return [dtype] if dtype in DTYPES else []


def _changes(golden: Golden, directory: Path) -> tuple[str, ...]:
    if golden.chat_format is None:
        return ()
    recorded, found = golden.tokenizer, tokenizer_fingerprint(directory)
    names = sorted(recorded.keys() | found.keys())
    return tuple(name for name in names if recorded.get(name) != found.get(name))


def _require_ids(golden: Golden, module: PreTrainedModel, path: Path) -> None:
    """Raises: SetupError for a prompt that this model has no embeddings for."""
    largest, rows = max(max(p.input_ids) for p in golden.prompts), len(module.get_input_embeddings().weight)
    if largest >= rows:
        raise SetupError(
            f"{GOLDEN_FILE} asks with token id {largest}, and the model has {rows} rows of embeddings",
            where=str(path),
            why="it was recorded with another model",
            fix="name the base that the run was trained on with --base",
        )
