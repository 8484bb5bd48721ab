"""The laws that a chat format keeps whatever is said in it. No torch here.

Each takes a format and how many random conversations to try, and raises LawBroken with the first that fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

import numpy as np

from lorasmith.errors import DataError
from lorasmith.testing.law import require
from lorasmith.testing.texts import full_width, halves_of_specials, opens_with_space, random_texts
from lorasmith.text.template import ChatFormat
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Ints, Message, Role

_TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi, who are you?"),
    Message("assistant", "Hello, I am nobody"),
    Message("user", "1+1?"),
    Message("assistant", "2, 你好"),
)


def prompt_is_prefix(chat_format: ChatFormat, rows: int = 300) -> None:
    """Law 7: the prompt of generation is, id by id, the prefix of what was trained."""
    law = "the prompt of generation is the prefix of what was trained"
    texts = random_texts(chat_format.tokenizer, 4 * rows, seed=7)
    talks = [
        _talk(("user", "assistant", "user", "assistant"), texts[i : i + 4]) for i in range(0, 4 * rows, 4)
    ]
    proven = sum(_is_prefix(chat_format, talk, law) for talk in talks)
    require(proven > rows / 3, law, f"only {proven} of {rows} conversations were not refused")


def no_special_from_text(chat_format: ChatFormat, rows: int = 300) -> None:
    """Law 8: text of the user never yields a special token id, and none of it is lost."""
    law = "text of the user never yields a special token id"
    texts = random_texts(chat_format.tokenizer, 3 * rows)
    clean = _special_ids(chat_format, ["a", "b", "c"])
    refused = 0
    for row in range(0, 3 * rows, 3):
        try:
            found = _special_ids(chat_format, texts[row : row + 3])
        except DataError as error:
            _require_border(error, chat_format, law)
            refused += 1
        else:
            require(found == clean, law, f"{texts[row : row + 3]!r}: {found} instead of {clean}")
    require(refused < rows / 2, law, f"{refused} of {rows} conversations were refused")
    _texts_come_back(chat_format, texts, law)


def no_special_from_joined_text(chat_format: ChatFormat, rows: int = 300) -> None:
    """Law 8 across borders: halves of special tokens that meet between messages, or within one, stay text."""
    law = "text of the user never yields a special token id"
    pairs = halves_of_specials(chat_format.tokenizer, rows)
    clean = _special_ids(chat_format, ["a", "b", "c"])
    refused = 0
    for head, tail in pairs:
        for contents in ([head, tail, head], [head + tail, full_width(head + tail), tail]):
            try:
                found = _special_ids(chat_format, contents)
            except DataError as error:
                _require_border(error, chat_format, law)
                refused += 1
            else:
                require(found == clean, law, f"{contents!r}: {found} instead of {clean}")
    require(refused <= len(pairs), law, f"{refused} of {2 * len(pairs)} conversations were refused")
    _texts_come_back(chat_format, [text for head, tail in pairs for text in (head, tail, head + tail)], law)


def streams_whole_characters(chat_format: ChatFormat, rows: int = 300) -> None:
    """An answer shown while it is made: no part is half a character, and together they are the answer."""
    law = "streaming gives whole characters that join to the text"
    tokenizer = chat_format.tokenizer
    texts = [text for text in random_texts(tokenizer, rows, seed=3) if "\ufffd" not in text]
    for ids in tokenizer.encode_all(texts):
        parts = list(tokenizer.stream(iter(ids)))
        require("".join(parts) == tokenizer.decode(ids), law, f"{parts} of {tokenizer.decode(ids)!r}")
        require(not any("\ufffd" in part for part in parts), law, f"half a character in {parts}")


def answers_are_trained_whole(chat_format: ChatFormat) -> None:
    """An answer's labels up to the first stop id are the answer: generated so, it would end there."""
    law = "the labels of an answer are the answer and a stop id"
    trained = chat_format.encode(Conversation(_TALK, "talk"))
    for turn, message in enumerate(_TALK):
        if message.role != "assistant":
            continue
        start = len(_prompt(chat_format, _TALK[:turn])) - 1
        said = _until_stop(trained.labels[start:], chat_format.stop_ids)
        read = chat_format.read_answer(chat_format.tokenizer.decode(said or []))
        require(read == message.content, law, f"{message.content!r} is trained as {read!r}, ids {said}")


def labels_are_ids(chat_format: ChatFormat) -> None:
    """Every label is IGNORE_INDEX or an id of the vocabulary; the conversation's last one is a stop id."""
    law = "labels are ids of the vocabulary and end in a stop id"
    labels = chat_format.encode(Conversation(_TALK, "talk")).labels
    given = labels[labels != IGNORE_INDEX]
    in_vocabulary = ((given >= 0) & (given < chat_format.tokenizer.vocab_size)).all()
    require(bool(in_vocabulary), law, f"labels {given.tolist()}")
    require(len(given) > 0 and int(given[-1]) in chat_format.stop_ids, law, f"labels {labels.tolist()}")


def stop_ids_are_special(chat_format: ChatFormat) -> None:
    """There is a stop id, and none can be spelled: each is the id of a special token."""
    law = "stop ids are ids of special tokens"
    strange = set(chat_format.stop_ids) - set(chat_format.tokenizer.special_tokens.values())
    require(bool(chat_format.stop_ids) and not strange, law, f"stop ids {chat_format.stop_ids}")


def _is_prefix(chat_format: ChatFormat, talk: Conversation, law: str) -> bool:
    try:
        trained = chat_format.encode(talk)
    except DataError as error:  # refused rather than trained askew, which only joint texts may
        _require_joint(error, chat_format, law)
        return False
    for turn in (1, 3):
        prompt = _prompt(chat_format, talk.messages[:turn])
        begun = np.array_equal(prompt, trained.input_ids[: len(prompt)])
        require(begun, law, f"{talk.messages!r}: {prompt.tolist()}, {trained.input_ids.tolist()}")
        _require_labels_from(trained, len(prompt) - 1, turn, chat_format, law)
    return True


def _require_labels_from(trained: Example, start: int, turn: int, chat_format: ChatFormat, law: str) -> None:
    """The prompt's last token predicts the answer's first; only an earlier answer is trained before."""
    require(int(trained.labels[start]) != IGNORE_INDEX, law, f"no label where answer {turn} begins")
    before = bool((trained.labels[:start] != IGNORE_INDEX).any())
    as_ever = before == (turn == 3) or chat_format.name != "official"
    require(as_ever, law, f"labels in front of answer {turn}: {trained.labels[:start].tolist()}")


def _require_joint(error: DataError, chat_format: ChatFormat, law: str) -> None:
    require(chat_format.joint_text, law, f"a conversation is refused: {error}")


def _require_border(error: DataError, chat_format: ChatFormat, law: str) -> None:
    at_border = chat_format.joint_text and "border of prompt and answer" in error.what
    require(at_border, law, f"a conversation is refused: {error}")


def _texts_come_back(chat_format: ChatFormat, texts: Sequence[str], law: str) -> None:
    tokenizer = chat_format.tokenizer
    encoded = tokenizer.encode_all(texts)
    lost = tokenizer.lost(texts, encoded)
    require(not lost, law, f"texts are lost: {[texts[index] for index in lost[:3]]!r}")
    special = set(tokenizer.special_tokens.values())
    forms = 2 if opens_with_space(tokenizer) else 1
    for text, ids in zip(texts, encoded, strict=True):
        require(special.isdisjoint(ids), law, f"{text!r} becomes {ids}")
        same = (text, text.removeprefix(" "))[:forms]
        require(tokenizer.decode(ids) in same, law, f"{text!r} comes back as {tokenizer.decode(ids)!r}")


def _special_ids(chat_format: ChatFormat, contents: Sequence[str]) -> Counter[int]:
    talk = _talk(("user", "assistant", "user"), contents)
    special = set(chat_format.tokenizer.special_tokens.values())
    return Counter(i for i in _prompt(chat_format, talk.messages).tolist() if i in special)


def _talk(roles: Sequence[str], contents: Sequence[str]) -> Conversation:
    known: dict[str, Role] = {role: role for role in get_args(Role)}
    messages = [Message(known[role], text) for role, text in zip(roles, contents, strict=True)]
    return Conversation(tuple(messages), "row")


def _prompt(chat_format: ChatFormat, messages: Sequence[Message]) -> Ints:
    return chat_format.encode(Conversation(tuple(messages), "row"), for_generation=True).input_ids


def _until_stop(labels: Ints, stop_ids: Sequence[int]) -> list[int] | None:
    """The labels before the first stop id; None if a position without a label comes first, or no stop id."""
    for end, label in enumerate(labels.tolist()):
        if label in stop_ids:
            return [int(i) for i in labels[:end]]
        if label == IGNORE_INDEX:
            return None
    return None
