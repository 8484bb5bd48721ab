"""Messages -> Pieces -> ids and labels: the one place where a conversation becomes numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lorasmith.chat.tokenizer import Tokenizer
from lorasmith.errors import DataError
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message, Piece


class ChatFormat(ABC):
    """How a family writes a conversation down. A subclass is final: it gives the pieces and the stop ids."""

    def __init__(self, name: str, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.stop_ids = tuple(dict.fromkeys(stop_ids))
        """Ids that end an answer, in generation as in training."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        """The conversation as pieces; with `for_generation` up to where the next answer begins.

        Raises: DataError if this format has no way to write these messages down.
        """

    def read_answer(self, text: str) -> str:
        """A decoded answer, without what the format itself puts around it."""
        return text.strip()

    def encode(self, conversation: Conversation, *, for_generation: bool = False) -> Example:
        """One conversation as an Example; see `encode_all`."""
        return self.encode_all([conversation], for_generation=for_generation)[0]

    def encode_all(
        self, conversations: Sequence[Conversation], *, for_generation: bool = False
    ) -> list[Example]:
        """Conversations as Examples, in one call to the tokenizer.

        With `for_generation`, `input_ids` is the whole prompt and there are no labels. Otherwise the last
        token is left out of `input_ids`: it has nothing to predict.

        Raises: DataError naming the conversation whose text does not survive encoding and decoding.
        """
        rendered = [(c.origin, join_text(self._pieces_of(c, for_generation))) for c in conversations]
        texts = [(origin, p.content) for origin, ps in rendered for p in ps if isinstance(p.content, str)]
        encoded = self.tokenizer.encode_all([text for _, text in texts])
        for index in self.tokenizer.lost([text for _, text in texts], encoded):
            raise _text_lost(*texts[index], self.tokenizer.decode(encoded[index]))
        ids_of_texts = iter(encoded)
        return [_example(pieces, ids_of_texts, origin, for_generation) for origin, pieces in rendered]

    def _pieces_of(self, conversation: Conversation, for_generation: bool) -> list[Piece]:
        try:
            return self.pieces(conversation.messages, for_generation=for_generation)
        except DataError as error:
            where = error.where or conversation.origin
            raise DataError(error.what, where=where, why=error.why, fix=error.fix) from None


def join_text(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring text of one kind becomes one text, which the tokenizer then sees as a whole."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last
            and isinstance(last.content, str)
            and isinstance(piece.content, str)
            and last.trained == piece.trained
        ):
            joined[-1] = replace(last, content=last.content + piece.content)
        else:
            joined.append(piece)
    return joined


def _example(
    pieces: Sequence[Piece], ids_of_texts: Iterator[Sequence[int]], origin: str, for_generation: bool
) -> Example:
    ids: list[int] = []
    targets: list[int] = []  # what stands here as a label, before the shift
    for piece in pieces:
        own = next(ids_of_texts) if isinstance(piece.content, str) else [piece.content]
        ids += own
        if piece.target is not None:
            targets += [piece.target]
        else:
            targets += own if piece.trained else [IGNORE_INDEX] * len(own)
    if for_generation:
        return Example(np.array(ids), np.full(len(ids), IGNORE_INDEX), origin)
    return Example(np.array(ids[:-1]), np.array(targets[1:]), origin)


def _text_lost(origin: str, text: str, decoded: str) -> DataError:
    return DataError(
        "the tokenizer loses text of this conversation",
        where=origin,
        why=f"{_head(text)!r} comes back as {_head(decoded)!r}",
        fix="the model directory's tokenizer does not fit this text or is damaged: get its files again, or "
        "leave the row out with --on-bad-row skip",
    )


def _head(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
