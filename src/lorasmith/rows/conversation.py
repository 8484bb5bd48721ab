"""Rows -> conversations: four row formats, one strict reading of each, and the rules a conversation obeys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias

from lorasmith.config import DataFormat
from lorasmith.errors import ConfigError, DataError
from lorasmith.rows.records import BadRow, Record, head
from lorasmith.types import Conversation, Message, Role

MAX_MESSAGES = 10_000
TYPO = "instrution"
"""What the tutorials write for `instruction`."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", TYPO, "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system"),
    "messages": ("messages", "system"),
    "prompt-completion": ("prompt", "completion", "query", "response", "system"),
}
"""The columns that each format reads."""

_NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"), (TYPO, "output")),
    "prompt-completion": (("prompt", "completion"), ("query", "response")),
}
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "tool_call", "observation", "ipython"})
_TURN_KEYS = (("role", "content"), ("from", "value"))

Turns: TypeAlias = list[Message]


@dataclass(frozen=True, slots=True)
class RowRules:
    """How rows are read. `columns` is {our field: their column}; `system` stands in where a row has none."""

    format: DataFormat
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    input_separator: str = ""


@dataclass(frozen=True, slots=True)
class Detection:
    format: DataFormat
    reason: str


class RowFault(ValueError):
    """Why one row is refused; becomes its BadRow."""

    def __init__(self, rule: str, value: str, fix: str) -> None:
        super().__init__(f"{rule}: {value}")
        self.rule, self.value, self.fix = rule, value, fix


def detect_format(records: Sequence[Record], columns: Mapping[str, str]) -> Detection:
    """The one format whose columns stand in these rows, and why.

    Raises: DataError if none fits, or more than one; ConfigError if `columns` maps a field of no format.
    """
    check_columns(columns)
    seen = {name for record in records for name in _renamed(record.fields, columns)}
    fitting = [
        (name, needed) for name, choices in _NEEDED.items() for needed in choices if seen.issuperset(needed)
    ]
    if len({name for name, _ in fitting}) == 1:
        name, needed = fitting[0]
        return Detection(name, f"its rows have {' and '.join(repr(key) for key in needed)}")  # type: ignore[arg-type]
    where = records[0].origin if records else ""
    found = ", ".join(sorted(repr(name) for name in seen))
    if fitting:
        names = sorted({name for name, _ in fitting})
        fix = f"say which one counts: data.format {' or '.join(names)}"
        raise DataError("the rows fit more than one format", where=where, why=f"columns: {found}", fix=fix)
    fix = "name the columns: data.columns {instruction: question, output: answer}"
    raise DataError("the rows are of no format that we know", where=where, why=f"columns: {found}", fix=fix)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises: ConfigError for a field that no format has."""
    known = sorted({name for names in FIELDS.values() for name in names} - {TYPO})
    for ours in columns:
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"data.columns: no format has a field {ours!r}", fix=fix)


def to_conversation(record: Record, rules: RowRules) -> Conversation | BadRow:
    """The row's messages in order, checked: system first, then user and assistant in turn, none empty.

    Every answer of the assistant is learned, also those in `history` and in a `prompt` of messages.
    """
    fields = _renamed(record.fields, rules.columns)
    try:
        messages = _READERS[rules.format](fields, rules)
        system = _system_of(fields, messages, rules)
        messages = [Message("system", system), *messages] if system else messages
        _check_structure(messages)
    except RowFault as fault:
        return BadRow(record.origin, fault.rule, fault.value, fault.fix)
    return Conversation(tuple(messages), record.origin)


def unread_columns(record: Record, rules: RowRules) -> Iterator[str]:
    """Names of what the row holds and its format does not read; a turn's own as `messages[].name`."""
    fields = _renamed(record.fields, rules.columns)
    read = set(FIELDS[rules.format])
    if TYPO in fields and "instruction" in fields:
        read.discard(TYPO)
    read -= {"query", "response"} if "prompt" in fields else set()
    yield from (name for name in fields if name not in read)
    for name in ("messages", "conversations", "prompt", "completion"):
        if name in read and isinstance(fields.get(name), list):
            known = {key for pair in _TURN_KEYS for key in pair}
            turns = [turn for turn in fields[name] if isinstance(turn, dict)]
            yield from dict.fromkeys(
                f"{name}[].{key}"
                for turn in turns
                for key in turn
                if key not in known and turn[key] is not None
            )


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return fields
    ours = {name: fields[theirs] for name, theirs in columns.items() if theirs in fields}
    taken = set(columns.values())
    rest = {
        f"{name} (not mapped)" if name in columns else name: value
        for name, value in fields.items()
        if name not in taken
    }
    return ours | rest


def _read_alpaca(fields: Mapping[str, Any], rules: RowRules) -> Turns:
    key = TYPO if TYPO in fields and "instruction" not in fields else "instruction"
    instruction, given = _text(fields, key), _text(fields, "input", default="")
    separator = rules.input_separator if instruction and given else ""
    turns = _history(fields)
    turns.append(_message("user", instruction + separator + given, f"{key} and input"))
    turns.append(_message("assistant", _text(fields, "output"), "output"))
    return turns


def _history(fields: Mapping[str, Any]) -> Turns:
    history = fields.get("history", [])
    if not isinstance(history, list):
        _wrong_type("history", history, "a list of [question, answer]")
    turns: Turns = []
    for index, pair in enumerate(history):
        name = f"history[{index}]"
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            _wrong_type(name, pair, "two texts, [question, answer]")
        turns += [_message("user", pair[0], f"{name}[0]"), _message("assistant", pair[1], f"{name}[1]")]
    return turns


def _read_prompt_completion(fields: Mapping[str, Any], rules: RowRules) -> Turns:
    first, second = (
        ("query", "response") if "query" in fields and "prompt" not in fields else ("prompt", "completion")
    )
    if isinstance(fields.get(first), list) and isinstance(fields.get(second), list):
        return _turns(fields, first) + _turns(fields, second)
    prompt = _text(fields, first)
    return [
        _message("user", prompt, first),
        _message("assistant", _text(fields, second), second),
    ]


def _turns(fields: Mapping[str, Any], name: str) -> Turns:
    if name not in fields:
        _missing(name)
    turns = fields[name]
    if not isinstance(turns, list):
        _wrong_type(name, turns, "a list of turns")
    if not turns:
        raise RowFault("no-messages", f"{name} = []", "fill the conversation or remove the row")
    if len(turns) > MAX_MESSAGES:
        fix = "cut the row into shorter conversations"
        raise RowFault("too-many-messages", f"{len(turns):,} in {name}, above {MAX_MESSAGES:,}", fix)
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        _wrong_type(name, turn, 'a turn {"role": ..., "content": ...}')
    role_key, text_key = next((pair for pair in _TURN_KEYS if pair[0] in turn), _TURN_KEYS[0])
    if role_key not in turn:
        _missing(f"{name}.{role_key}")
    role = turn[role_key]
    if not isinstance(role, str):
        _wrong_type(f"{name}.{role_key}", role, "a text")
    if role in _TOOL_ROLES or turn.get("tool_calls"):
        fix = "leave the row out, or write the tool's part as plain text into the other turns"
        raise RowFault("tool-role", head(role, f"{name}.{role_key}") + ": tool calls are not trained", fix)
    if role not in _ROLES:
        raise RowFault("unknown-role", head(role, f"{name}.{role_key}"), f"known: {', '.join(_ROLES)}")
    return _message(_ROLES[role], _text(turn, text_key, f"{name}.{text_key}"), f"{name}.{text_key}")


def _system_of(fields: Mapping[str, Any], messages: Turns, rules: RowRules) -> str | None:
    own = _text(fields, "system", default="")
    has_turn = any(message.role == "system" for message in messages)
    if own.strip() and has_turn:
        raise RowFault("two-systems", head(own, "system"), "keep the system turn or the column, not both")
    return None if has_turn else own if own.strip() else rules.system


def _text(fields: Mapping[str, Any], key: str, name: str = "", *, default: str | None = None) -> str:
    name = name or key
    if key not in fields:
        if default is None:
            _missing(name)
        return default
    value = fields[key]
    if not isinstance(value, str):
        _wrong_type(name, value, "a text")
    return value


def _message(role: Role, content: str, name: str) -> Message:
    if not content.strip():
        raise RowFault("empty-text", head(content, name), "write the text or remove the row")
    return Message(role, content)


def _missing(name: str) -> NoReturn:
    raise RowFault("missing-field", name, "add it, or name your column in data.columns")


def _wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    raise RowFault("wrong-type", head(value, name), f"write {wanted}; nothing is converted")


def _check_structure(messages: Sequence[Message]) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    roles = [message.role for message in turns]
    if "system" in roles:
        place = f"message {messages.index(turns[roles.index('system')]) + 1} of {len(messages)}"
        raise RowFault(
            "system-not-first", f"a system turn as {place}", "only the first turn may be the system's"
        )
    if "assistant" not in roles:
        raise RowFault("no-answer", _shape(messages), "add the answer that is to be learned")
    if roles[0] == "assistant":
        raise RowFault("starts-with-answer", _shape(messages), "begin with a user turn")
    for role, following in pairwise(roles):
        if role == following:
            raise RowFault("same-role-twice", _shape(messages), "join the two turns, or add the one between")
    if roles[-1] == "user":
        raise RowFault("ends-with-question", _shape(messages), "add the last answer, or remove the last turn")


def _shape(messages: Sequence[Message]) -> str:
    roles = [message.role for message in messages]
    return ", ".join(roles[:6]) + (f", ... ({len(roles)} turns)" if len(roles) > 6 else "")


_READERS: Mapping[str, Callable[[Mapping[str, Any], RowRules], Turns]] = {
    "alpaca": _read_alpaca,
    "sharegpt": lambda fields, rules: _turns(fields, "conversations"),
    "messages": lambda fields, rules: _turns(fields, "messages"),
    "prompt-completion": _read_prompt_completion,
}
