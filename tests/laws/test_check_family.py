"""Our own families pass what is asked of plug-ins; broken ones are caught, each by its law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from chat_texts import BY_TEMPLATE, LIKE, REAL, real_directory
from modules import KINDS, tiny_module
from transformers import PreTrainedModel

from lorasmith.families import find_family
from lorasmith.testing import LawBroken, check_family
from lorasmith.text.template import ChatFormat
from lorasmith.types import Message, Piece


@pytest.mark.parametrize("name", [*LIKE, *BY_TEMPLATE])
def test_our_own_pass(tmp_path: Path, name: str) -> None:
    write = {**LIKE, **BY_TEMPLATE}[name]
    module = partial(tiny_module, name) if name in KINDS else None
    checked = check_family(find_family({}, name), write(tmp_path), module=module)
    assert len(checked) == (6 if module is None else 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_our_own_pass_with_their_real_vocabularies(shared: Path, tmp_path: Path, name: str) -> None:
    assert check_family(find_family({}, name), real_directory(shared, tmp_path, name))


class Changed(ChatFormat):
    """Baichuan2's own format, its pieces changed by `change`."""

    def __init__(self, whole: ChatFormat, change: Callable[[list[Piece], bool], list[Piece]]) -> None:
        self._whole, self._change = whole, change
        super().__init__("official", whole.tokenizer, whole.stop_ids)

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces = self._whole.pieces(messages, for_generation=for_generation)
        return self._change(pieces, for_generation)


def no_end(pieces: list[Piece], for_generation: bool) -> list[Piece]:
    return [piece for piece in pieces if piece.content != 2]


def other_prompt(pieces: list[Piece], for_generation: bool) -> list[Piece]:
    return [Piece("Now: "), *pieces] if for_generation else pieces


def half_an_answer(pieces: list[Piece], for_generation: bool) -> list[Piece]:
    return [
        replace(p, content=p.content[:3]) if p.trained and isinstance(p.content, str) else p for p in pieces
    ]


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (no_end, "the prompt of generation is the prefix"),
        (other_prompt, "the prompt of generation is the prefix"),
        (half_an_answer, "the labels of an answer are the answer and a stop id"),
    ],
)
def test_a_broken_format_is_caught(
    tmp_path: Path, change: Callable[[list[Piece], bool], list[Piece]], law: str
) -> None:
    family = find_family({}, "baichuan2")
    official = family.chat_formats["official"]
    broken = {"official": lambda tokenizer, extra: Changed(official(tokenizer, extra), change)}
    with pytest.raises(LawBroken, match=law):
        check_family(replace(family, chat_formats=broken), LIKE["baichuan2"](tmp_path))


def moody_module() -> PreTrainedModel:
    """It says the opposite when it is asked for one token at a time."""
    module = tiny_module("llama3")
    module.lm_head.register_forward_hook(lambda _, args, out: -out if args[0].shape[1] == 1 else out)
    return module


def leaking_module() -> PreTrainedModel:
    """What it says depends on how many tokens lie in the row."""
    module = tiny_module("llama3")
    module.lm_head.register_forward_hook(lambda _, args, out: out * args[0].shape[1])
    return module


@pytest.mark.parametrize(
    ("module", "law"), [(moody_module, "one forward pass"), (leaking_module, "one by one")]
)
def test_a_broken_module_is_caught(tmp_path: Path, module: Callable[[], PreTrainedModel], law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        check_family(find_family({}, "llama3"), LIKE["llama3"](tmp_path), module=module)
