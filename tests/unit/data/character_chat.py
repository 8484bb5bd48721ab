"""A chat format whose tokens are characters: every id can be checked by eye; real in every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lorasmith.errors import DataError
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

SPECIAL = {"<|bos|>": 0, "<|user|>": 1, "<|assistant|>": 2, "<|end|>": 3}


class CharacterTokenizer(Tokenizer):
    chat_template = None

    @property
    def vocab_size(self) -> int:
        return 0x110000 + len(SPECIAL)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return SPECIAL

    @property
    def eos_id(self) -> int:
        return SPECIAL["<|end|>"]

    @property
    def pad_id(self) -> int:
        return SPECIAL["<|bos|>"]

    def encode_all(self, texts: Sequence[str], *, starts: Sequence[bool] | None = None) -> list[list[int]]:
        """ "☠" is what this tokenizer cannot encode: it loses it."""
        return [[ord(letter) + len(SPECIAL) for letter in text if letter != "☠"] for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        names = {number: name for name, number in SPECIAL.items()}
        return "".join(
            ("" if skip_special else names[number]) if number in names else chr(number - len(SPECIAL))
            for number in ids
        )

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        return [index for index, text in enumerate(texts) if self.decode(encoded[index]) != text]

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        return (self.decode([number]) for number in ids)


class CharacterChat(ChatFormat):
    """bos (text assistant ANSWER END)*; an answer with ☾ is not learned, a text with ☢ is refused."""

    role_markers = ("\nUser:",)

    def __init__(self) -> None:
        super().__init__("characters", CharacterTokenizer(), [SPECIAL["<|end|>"]])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces = [Piece(SPECIAL["<|bos|>"])]
        for message in messages:
            if "☢" in message.content:
                raise DataError("this format does not write that down", fix="write something else")
            if message.role == "assistant":
                learned = "☾" not in message.content
                pieces += [Piece(message.content, learned), Piece(SPECIAL["<|end|>"], learned)]
            else:
                pieces.append(Piece(message.content))
            if message.role == "user":
                pieces += [Piece(SPECIAL["<|assistant|>"])]
        return pieces
