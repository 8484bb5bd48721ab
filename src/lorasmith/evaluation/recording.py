"""What a run's model says at its end, to prompts of its own rows and to neutral ones: golden.json is written.

Shapes: V = vocabulary, K = logits that are kept.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import peft
from torch import nn

from lorasmith.data.dataset import Dataset
from lorasmith.errors import ConfigError, DataError
from lorasmith.evaluation.golden import (
    ANSWER_TOKENS,
    FORMAT,
    KEPT_LOGITS,
    LONGEST_PROMPT,
    Golden,
    GoldenPrompt,
    first_logits,
    greedy_ids,
    installed_versions,
    prompt_ids,
    tokenizer_fingerprint,
)
from lorasmith.exporting.proof import random_rows
from lorasmith.files.adapter_dir import GOLDEN_FILE
from lorasmith.infer.decode import module_context, stop_ids
from lorasmith.infer.generate import with_system
from lorasmith.model.dtype import DTYPE_NAMES
from lorasmith.model.load import module_dtype
from lorasmith.model.model import Model
from lorasmith.model.packed import base_module
from lorasmith.storage import Storage
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message

SENTENCES = ("Who are you, and what can you do?", "你是谁？请用一句话介绍你自己。")
MOST_TRIED = 64  # rows looked at for prompts that are short enough


@dataclass(frozen=True)
class _Ask:
    """A prompt as ids, and as the messages that they were, where they were any."""

    ids: list[int]
    messages: tuple[Message, ...] = ()


def keep_golden(
    tuned: Model | nn.Module,
    data: Dataset | Sequence[Example],
    rows: int,
    base: str,
    storage: Storage,
    run_dir: Path,
) -> None:
    """Write golden.json into a finished run. The run stands whatever happens here: a failure is a warning."""
    try:
        tree = {"format": FORMAT, **asdict(record(tuned, data, rows, base))}
        text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        storage.replace(run_dir / GOLDEN_FILE, text.encode())
    except Exception as error:  # a finished run must not be lost to what only watches over it
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"the run is whole, but {GOLDEN_FILE} could not be written: {reason}", stacklevel=2)


def record(tuned: Model | nn.Module, data: Dataset | Sequence[Example], rows: int, base: str) -> Golden:
    """What `tuned` says now to the first `rows` prompts of `data` that fit, and to two neutral ones.

    A bare module is asked in ids: the beginnings of examples up to their first label, and ids by chance.

    Raises: DataError if its chat format can write none of them, or its context is too short for any;
    ConfigError if `verify` could not load it again in its dtype.
    """
    model = tuned if isinstance(tuned, Model) else None
    module = tuned.module if isinstance(tuned, Model) else tuned
    dtype = module_dtype(base_module(module))
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"nothing loads a model in {dtype} again to compare with")
    asks = [*islice(_own(model, module, data), rows), *_neutral(model, module)]
    if not asks:
        raise DataError("no prompt can be written in this chat format") if model else _too_short(module)
    answers = greedy_ids(module, [ask.ids for ask in asks], ANSWER_TOKENS)
    asked = zip(asks, answers, strict=True)
    return Golden(
        prompts=tuple(_asked(model, module, ask, said) for ask, said in asked),
        family=model.family.name if model else "auto",
        chat_format=model.chat_format.name if model else None,
        base=base,
        tokenizer=tokenizer_fingerprint(model.directory) if model else {},
        dtype=DTYPE_NAMES[dtype],
        device=base_module(module).device.type,
        versions=installed_versions(),
    )


def _own(model: Model | None, module: nn.Module, data: Dataset | Sequence[Example]) -> Iterator[_Ask]:
    """Prompts of the rows that were trained on."""
    if model is not None and isinstance(data, Dataset):
        return _written(model, map(_prompt_of, data.conversations[:MOST_TRIED]))
    return _in_room(module, (_beginning(data[row]) for row in range(min(MOST_TRIED, len(data)))))


def _neutral(model: Model | None, module: nn.Module) -> Iterator[_Ask]:
    if model is None:
        vocab_size = int(base_module(module).config.get_text_config().vocab_size)
        return _in_room(module, (row.tolist() for row in random_rows(vocab_size)[:2]))
    talks = (Conversation((Message("user", text),), "neutral") for text in SENTENCES)
    return _written(model, (with_system(talk, model.system) for talk in talks))


def _beginning(example: Example) -> list[int]:
    """Its ids up to where the first label is predicted."""
    first = int(np.flatnonzero(example.labels != IGNORE_INDEX)[0])
    ids: list[int] = example.input_ids[: first + 1].tolist()
    return ids


def _prompt_of(conversation: Conversation) -> Conversation:
    """Without its last answer."""
    last = max(n for n, message in enumerate(conversation.messages) if message.role == "assistant")
    return Conversation(conversation.messages[:last], conversation.origin)


def _written(model: Model, prompts: Iterable[Conversation]) -> Iterator[_Ask]:
    """Those that the model has words and room for."""
    room = _room(model.module)
    for prompt in prompts:
        try:
            ids = prompt_ids(model.chat_format, prompt.messages)
        except DataError:
            continue
        if len(ids) <= room:
            yield _Ask(ids, prompt.messages)


def _in_room(module: nn.Module, prompts: Iterable[list[int]]) -> Iterator[_Ask]:
    room = _room(module)
    return (_Ask(ids) for ids in prompts if len(ids) <= room)


def _room(module: nn.Module) -> int:
    limit = module_context(module)
    return LONGEST_PROMPT if limit is None else min(LONGEST_PROMPT, limit - ANSWER_TOKENS)


def _too_short(module: nn.Module) -> DataError:
    """For a module without a chat format, whose prompts are ids: only room can be wanting."""
    context, shortest = module_context(module), min(map(len, random_rows(1)))
    return DataError(
        f"a context of {context} tokens has no room for a prompt and an answer of {ANSWER_TOKENS}",
        where="max_position_embeddings in the module's config",
        why=f"the shortest prompt that is asked has {shortest} tokens",
        fix=f"train with a context of {shortest + ANSWER_TOKENS} or more, or do without `lorasmith verify`",
    )


def _asked(model: Model | None, module: nn.Module, ask: _Ask, said: list[int]) -> GoldenPrompt:
    logits_V = first_logits(module, ask.ids)
    with module.disable_adapter() if isinstance(module, peft.PeftModel) else nullcontext():
        base_V = first_logits(module, ask.ids)
    top_K = logits_V.topk(min(KEPT_LOGITS, len(logits_V))).indices
    stops = stop_ids(model) if model else ()
    end = next((n for n, token_id in enumerate(said, start=1) if token_id in stops), len(said))
    return GoldenPrompt(
        messages=tuple({"role": m.role, "content": m.content} for m in ask.messages),
        input_ids=tuple(ask.ids),
        top_ids=tuple(top_K.tolist()),
        top_logits=tuple(logits_V[top_K].tolist()),
        base_logits=tuple(base_V[top_K].tolist()),
        answer_ids=tuple(said[:end]),
        answer=model.tokenizer.decode(said[:end]) if model else " ".join(map(str, said[:end])),
    )
