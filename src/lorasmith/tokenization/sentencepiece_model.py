"""SentencePieceTokenizer: the contract of tokenizer.py over an original tokenizer.model file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from sentencepiece import SentencePieceProcessor

from lorasmith.tokenization.model_file import with_control_pieces
from lorasmith.tokenization.tokenizer import Tokenizer

_SPACE = "▁"


@dataclass(frozen=True)
class SpecialPieces:
    """Which tokens of a tokenizer.model exist by id only, besides its own control pieces."""

    reserved: str | None = None
    """A pattern of whole pieces that the file lets any text spell, though the model obeys them."""
    appended: tuple[str, ...] = ()
    """Tokens that the file does not know: their ids follow its last one, in this order."""


@final
class SentencePieceTokenizer(Tokenizer):
    """`model` is the content of tokenizer.model.

    Every text gets the opening space that the file asks for (add_dummy_prefix) wherever it stands, as in the
    authors' own tokenizers. The pieces that `special` reserves are control pieces in our copy: text spells
    them with other pieces, as it always spelled "</s>".

    Raises: ValueError, RuntimeError if `model` is no sentencepiece model.
    """

    def __init__(
        self, model: bytes, special: SpecialPieces | None = None, *, chat_template: str | None = None
    ) -> None:
        self.chat_template = chat_template
        self._model, self._rules = model, special or SpecialPieces()
        if not model:
            raise ValueError("the file is empty")
        if self._rules.reserved is not None:
            model = with_control_pieces(model, self._rules.reserved)
        self._processor = SentencePieceProcessor(model_proto=model)
        pieces = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        self._special = _special_tokens(self._processor, pieces, self._rules.appended)
        self._spellings = _spellings(self._processor, pieces)
        self._special_texts = {token_id: text.encode() for text, token_id in self._special.items()}
        self._opens_with_space = self._processor.normalize("a") == f"{_SPACE}a"

    @property
    def files(self) -> Mapping[str, bytes]:
        """What the authors' own class and every other engine load: the original, not our copy."""
        return {"tokenizer.model": self._model}

    @property
    def vocab_size(self) -> int:
        return len(self._spellings) + len(self._rules.appended)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    @property
    def eos_id(self) -> int | None:
        return _id_or_none(self._processor.eos_id())

    @property
    def pad_id(self) -> int:
        pad = _id_or_none(self._processor.pad_id())
        return int(self._processor.unk_id()) if pad is None else pad

    def encode_all(self, texts: Sequence[str], *, starts: Sequence[bool] | None = None) -> list[list[int]]:
        encode = self._processor.encode  # one by one: for a list it starts threads, slower than the work
        return [encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text = b"".join(self._spelled(ids, skip_special)).decode(errors="replace")
        return text.removeprefix(" ") if self._opens_with_space else text

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        rows = zip(texts, encoded, strict=True)
        return [index for index, row in enumerate(rows) if not self._survives(*row)]

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        at_start = self._opens_with_space
        for spelling in self._spelled(ids, skip_special=True):
            text = decoder.decode(spelling)
            shown = text.removeprefix(" ") if at_start else text
            at_start = at_start and not text
            if shown:
                yield shown
        if rest := decoder.decode(b"", final=True):
            yield rest

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (self._model, self._rules, self.chat_template)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model + repr((self._rules, self.chat_template)).encode()).hexdigest()

    def _spelled(self, ids: Iterable[int], skip_special: bool) -> Iterator[bytes]:
        """Each id in UTF-8; ids beyond the vocabulary, for which a padded head has room, are nothing."""
        for token_id in ids:
            if token_id in self._special_texts:
                yield b"" if skip_special else self._special_texts[token_id]
            elif 0 <= token_id < len(self._spellings):
                yield self._spellings[token_id]

    def _survives(self, text: str, ids: Sequence[int]) -> bool:
        if self._processor.unk_id() in ids:
            return False
        decoded = self.decode(ids)
        return decoded == text or self._processor.normalize(decoded) == self._processor.normalize(text)


def _revived(model: bytes, special: SpecialPieces, chat_template: str | None) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, special, chat_template=chat_template)


def _special_tokens(
    processor: SentencePieceProcessor, pieces: Sequence[str], appended: Sequence[str]
) -> dict[str, int]:
    by_id_only = (i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i))
    behind = {token: len(pieces) + index for index, token in enumerate(appended)}
    return {pieces[i]: i for i in by_id_only} | behind


def _spellings(processor: SentencePieceProcessor, pieces: Sequence[str]) -> list[bytes]:
    """What each piece stands for in UTF-8; a byte piece ("<0x0A>") may be half a character."""
    spelled = [piece.replace(_SPACE, " ").encode() for piece in pieces]
    for index, piece in enumerate(pieces):
        if processor.is_byte(index):
            spelled[index] = bytes([int(piece[1:-1], base=16)])
    return spelled


def _id_or_none(token_id: int) -> int | None:
    return None if token_id < 0 else int(token_id)
