"""Text <-> token ids, with special tokens kept apart: they exist by id only, never by their text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from lorasmith.errors import TokenizerError


class Tokenizer(ABC):
    """What every room asks of a tokenizer. Implementations are final."""

    chat_template: str | None
    """The model directory's own jinja template, if it has one."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """The text of every control token and its id. None of these ids comes out of `encode_all`."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None: ...

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """An id to fill batches with; always masked, never labelled."""

    @abstractmethod
    def encode_all(self, texts: Sequence[str], *, starts: Sequence[bool] | None = None) -> list[list[int]]:
        """Plain texts as ids, nothing added before or behind; the text of a special token stays text.

        `starts` says which texts stand at the very start of a conversation (None: all do); it matters to
        vocabularies that put a space of their own before the first text only.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    @abstractmethod
    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the texts that do not come back from their ids: the tokenizer lost some of them."""

    @abstractmethod
    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Decode id by id; yields only whole characters, which joined give `decode` of all ids."""

    def fingerprint(self) -> str | None:
        """sha256 of all that its ids depend on; None: nobody can tell, so nothing of it is cached."""
        return None

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def special_id(self, token: str) -> int:
        """Raises: TokenizerError if the vocabulary has no such special token."""
        if token not in self.special_tokens:
            raise TokenizerError(
                f"the tokenizer has no special token {token!r}",
                why="the chat format needs it to mark turns",
                fix="check that the tokenizer file belongs to this model, or choose another --family",
            )
        return self.special_tokens[token]
