"""A model directory's tokenizer and chat format, held to what training relies on."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from lorasmith.doctor.check import Check
from lorasmith.families import generic
from lorasmith.families.base import Family
from lorasmith.families.canary import load_canary
from lorasmith.families.opening import context_length, open_chat
from lorasmith.model.load import empty_module
from lorasmith.model.plugin_classes import family_config
from lorasmith.testing import chat_laws
from lorasmith.testing.law import LawBroken, require
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message

_ROWS = 40
"""Random conversations for each law: a tenth of a second each."""
_USER = Message("user", "Hi,  who are you?\n你是谁？")
_ANSWER = Message("assistant", "Nobody.\n\n1723 是 é 🌸")


def _stop_ids_are_special(written: ChatFormat, rows: int) -> None:
    chat_laws.stop_ids_are_special(written)


_LAWS = (
    chat_laws.prompt_is_prefix,
    chat_laws.no_special_from_text,
    chat_laws.streams_whole_characters,
    _stop_ids_are_special,
)


def tokenizer_check(directory: Path, family: str, chat_format: str) -> Check:
    """The canary: known strings give known ids, or at least come back. Raises: TokenizerError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, written = open_chat(directory, family, chat_format)
    repaired = [str(warning.message) for warning in caught if "repaired" in str(warning.message)]
    if repaired:
        remedy = "get the model's own tokenizer file again; until then it is repaired at each load"
        return Check("tokenizer", "warn", repaired[0], remedy)
    canary = load_canary(found)
    size = f"{written.tokenizer.vocab_size:,} ids"
    if canary is not None and canary.is_about(written.tokenizer):
        return Check("tokenizer", "ok", f"{size}; {len(canary.strings)} known strings give the known ids")
    return Check("tokenizer", "ok", f"{size}; a vocabulary whose ids are not known here")


def chat_check(directory: Path, family: str, chat_format: str) -> Check:
    """One conversation there and back, then the laws of chat formats on random ones.

    A template from elsewhere that breaks a law on some random conversation is a warning: such rows are
    refused when they are read. Raises: LawBroken with the conversation otherwise; errors of `open_chat`.
    """
    found, written = _opened(directory, family, chat_format)
    _round_trip(written)
    try:
        for law in _LAWS:
            law(written, _ROWS)
    except LawBroken as error:
        if found is not generic.FAMILY:
            raise
        remedy = "single rows may be refused: `lorasmith data check` tells which"
        return Check("chat format", "warn", f"not for every conversation: {error}"[:300], remedy)
    stops = ", ".join(map(str, written.stop_ids))
    told = f"{found.name} {written.name}: a prompt is the prefix of its training ids, stop ids {stops}"
    return Check("chat format", "ok", told)


def embeddings_check(directory: Path, family: str, chat_format: str) -> Check:
    """A row of embeddings for every id that the tokenizer gives."""
    found, written = _opened(directory, family, chat_format)
    module = empty_module(family_config(directory, found))
    rows, ids = module.get_input_embeddings().weight.shape[0], written.tokenizer.vocab_size
    told = f"{rows:,} rows of embeddings for {ids:,} ids, context {context_length(directory) or 'unlimited'}"
    if rows < ids:
        return Check("embeddings", "fail", told, "use the tokenizer files that came with this model")
    return Check("embeddings", "ok", told)


def _round_trip(written: ChatFormat) -> None:
    """The prompt is the head of what is trained, and the labels behind it are the answer and a stop id."""
    law = "a conversation comes back from its ids"
    trained = written.encode(Conversation((_USER, _ANSWER), "doctor"))
    prompt = written.encode(Conversation((_USER,), "doctor"), for_generation=True).input_ids
    begun = np.array_equal(prompt, trained.input_ids[: len(prompt)])
    require(begun, law, f"the prompt {prompt.tolist()} does not begin {trained.input_ids.tolist()}")
    labels = trained.labels[len(prompt) - 1 :].tolist()
    ends = [n for n, label in enumerate(labels) if label in written.stop_ids]
    require(bool(ends), law, f"no stop id {written.stop_ids} is trained: {labels}")
    answer = written.read_answer(written.tokenizer.decode(labels[: ends[0]]))
    require(answer == _ANSWER.content, law, f"{_ANSWER.content!r} is trained as {answer!r}")


def _opened(directory: Path, family: str, chat_format: str) -> tuple[Family, ChatFormat]:
    """What `tokenizer_check` warns of is not said twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_chat(directory, family, chat_format)
