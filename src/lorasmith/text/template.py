"""Messages -> Pieces -> ids and labels: the one place where a conversation becomes numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np

from lorasmith.errors import DataError, SetupError
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message, Piece


class ChatFormat(ABC):
    """How a family writes a conversation down. A subclass is final: it gives the pieces and the stop ids."""

    role_markers: ClassVar[tuple[str, ...]] = ()
    """Plain text that marks turns: no token rule can protect it, so rows that contain it deserve a look."""
    joint_text: ClassVar[bool] = False
    """Text between two special tokens is one text to the tokenizer, also where training begins inside it."""

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

    def pieces_of_all(
        self, conversations: Sequence[Conversation], *, for_generation: bool
    ) -> list[list[Piece]]:
        """`pieces` of each, for a format that can do more with many at once.

        Raises: DataError naming the conversation that has no answer or that this format cannot write down.
        """
        pieces_of_all = []
        for conversation in conversations:
            with told_at(conversation.origin):
                check_turns(conversation, for_generation)
                pieces = self.pieces(conversation.messages, for_generation=for_generation)
            pieces_of_all.append(pieces if self.joint_text else join_text(pieces))
        return pieces_of_all

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
        pieces_of_all = self.pieces_of_all(conversations, for_generation=for_generation)
        rendered = [(c.origin, pieces) for c, pieces in zip(conversations, pieces_of_all, strict=True)]
        texts = [text for origin, pieces in rendered for text in self._texts(pieces, origin)]
        encoded = self._encode_texts(texts)
        own_ids = iter([_own_ids(*pair) for pair in zip(texts, encoded, [[], *encoded], strict=False)])
        return [_example(pieces, own_ids, origin, for_generation) for origin, pieces in rendered]

    def _encode_texts(self, texts: Sequence[_Text]) -> list[list[int]]:
        contents = [text.content for text in texts]
        encoded = self.tokenizer.encode_all(contents, starts=[text.at_start for text in texts])
        for index in self.tokenizer.lost(contents, encoded):
            raise _text_lost(texts[index].origin, contents[index], self.tokenizer.decode(encoded[index]))
        return encoded

    def _texts(self, pieces: Sequence[Piece], origin: str) -> Iterator[_Text]:
        """One text for each piece of text; with `joint_text` it begins with the pieces it continues."""
        before, at_start = "", True
        for piece in pieces:
            if not isinstance(piece.content, str):
                before, at_start = "", False
                continue
            text = before + piece.content
            yield _Text(text, at_start, bool(before), origin)
            before = text if self.joint_text else ""
            at_start = at_start and self.joint_text


class _Text(NamedTuple):
    content: str
    at_start: bool  # of the conversation
    continues: bool  # begins with the text before it
    origin: str


def _own_ids(text: _Text, ids: Sequence[int], ids_before: Sequence[int]) -> Sequence[int]:
    """The ids that `text` adds to the text it continues.

    Raises: DataError if the tokenizer joins the two across their border, so that a prompt, which ends
    there, would not be the beginning of what is trained.
    """
    if not text.continues:
        return ids
    if list(ids[: len(ids_before)]) != list(ids_before):
        raise DataError(
            "a token of this conversation lies on the border of prompt and answer",
            where=text.origin,
            why=f"the tokenizer joins the end of the one and the head of the other: {text.content[-60:]!r}",
            fix="take the white space or punctuation off the head of the answer",
        )
    return ids[len(ids_before) :]


@contextmanager
def told_at(origin: str) -> Iterator[None]:
    """A DataError or SetupError of the block says where, if it does not yet."""
    try:
        yield
    except (DataError, SetupError) as error:
        raise type(error)(error.what, where=error.where or origin, why=error.why, fix=error.fix) from None


def check_turns(conversation: Conversation, for_generation: bool) -> None:
    """Raises: DataError without a message, or for training without an answer."""
    roles = {message.role for message in conversation.messages}
    if not roles or (not for_generation and "assistant" not in roles):
        what = "this conversation has no message" if not roles else "this conversation has no answer to learn"
        fix = "give it a user and an assistant message, or leave the row out"
        raise DataError(what, where=conversation.origin, fix=fix)


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
