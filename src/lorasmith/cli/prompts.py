"""Prompt files: one JSON object per line, {"prompt": ...} or {"messages": [...]}; more keys are kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import DataError, SetupError
from lorasmith.rows.strict_json import parse_line
from lorasmith.types import Completion, Conversation, Message

_MOST_TOLD = 10
_OURS = ("answer", "finish_reason", "num_prompt_tokens", "num_completion_tokens")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptRow:
    """One line: the object as it was written, and the conversation it asks to continue."""

    fields: dict[str, Any]
    conversation: Conversation


def read_prompts(source: str) -> list[PromptRow]:
    """All rows of a file, or of standard input for "-"; empty lines are skipped.

    Raises: DataError naming every bad line as file:line; SetupError if the file cannot be read.
    """
    name = "stdin" if source == "-" else Path(source).name
    rows: list[PromptRow] = []
    faults: list[str] = []
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, f"{name}:{number}"))
        except (ValueError, TypeError, RecursionError) as error:
            faults.append(f"{name}:{number} {error}")
    if faults:
        raise _bad_lines(faults)
    if not rows:
        raise DataError("there are no prompts", where=name, fix='write one {"prompt": "..."} per line')
    return rows


def answered(row: PromptRow, answer: Completion) -> str:
    """The row as a line of JSON, with its answer."""
    fields = {**row.fields, "answer": answer.content, "finish_reason": answer.finish_reason}
    counts = {
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_completion_tokens": answer.num_completion_tokens,
    }
    return json.dumps({**fields, **counts}, ensure_ascii=False)


def _lines(source: str) -> Iterable[str]:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise SetupError(f"there is no file {source}", fix="check --data") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError("the file is not UTF-8", where=f"{source}:{line}", fix="save it as UTF-8") from None
    except OSError as error:
        raise SetupError(f"{source} cannot be read", why=str(error)) from None


def _row(line: str, origin: str) -> PromptRow:
    fields = parse_line(line)
    if not isinstance(fields, dict):
        raise TypeError(f"is a {type(fields).__name__}, not an object")
    if _HALF_CHARACTER.search(json.dumps(fields, ensure_ascii=False)):
        raise ValueError("has half a character (a lone surrogate such as \\ud83d)")
    taken = [key for key in _OURS if key in fields]
    if taken:
        raise ValueError(f"already has {taken[0]!r}, which the answer would overwrite")
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError('needs either "prompt" or "messages"')
    turns = fields.get("messages", [{"role": "user", "content": fields.get("prompt")}])
    return PromptRow(fields, Conversation(tuple(_messages(turns)), origin))


def _messages(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise TypeError('"messages" must be a list of {"role", "content"} objects')
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise TypeError('each message must have "role" and "content", and nothing else')
        messages.append(Message(turn["role"], turn["content"]))
    if messages[-1].role != "user":
        raise ValueError(f"ends with a message of the {messages[-1].role}: there is nothing to answer")
    return messages


def _bad_lines(faults: list[str]) -> DataError:
    more = [f"and {len(faults) - _MOST_TOLD} more"] if len(faults) > _MOST_TOLD else []
    noun = "line is no prompt" if len(faults) == 1 else "lines are no prompts"
    return DataError(
        "\n".join([f"{len(faults)} {noun}:", *faults[:_MOST_TOLD], *more]),
        fix='write each as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )
