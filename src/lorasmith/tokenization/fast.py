"""FastTokenizer: the contract of tokenizer.py over a `tokenizers` backend."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, groupby, pairwise
from operator import not_
from typing import Any, final

import tokenizers
import tokenizers.models

from lorasmith.errors import TokenizerError
from lorasmith.tokenization.tokenizer import Tokenizer

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@final
class FastTokenizer(Tokenizer):
    """A backend as tokenizer.json defines it, with control tokens switched off in text.

    `backend` becomes ours: it must have every control token as an added token flagged special.
    `named` are the tokens that tokenizer_config.json names (bos_token, eos_token, ...), by their text.

    Raises: TokenizerError if bos or eos is named and the vocabulary does not have it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.named = dict(named or {})
        self.chat_template = chat_template
        self._backend = _without_extras(backend)
        self._inner = _without_opening_space(self._backend)
        self._special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._special_ids = frozenset(self._special.values())
        self._verbatim = _verbatim(backend)
        self._unk_id = _unk_id(backend)
        self._opens_with_space = _uses_metaspace(backend)
        self._eos_id = self._named_id("eos_token")
        self._named_id("bos_token")

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @property
    def pad_id(self) -> int:
        pad = self._backend.token_to_id(self.named.get("pad_token", ""))
        return int(pad if pad is not None else self._eos_id or 0)

    @property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control tokens as the backend would, with the white space that lstrip and rstrip swallow.

        `match[match.lastindex]` is the token itself.
        """
        kinds: dict[tuple[bool, bool, bool], list[str]] = {}
        for token in self._backend.get_added_tokens_decoder().values():
            if token.special:
                kinds.setdefault((token.lstrip, token.rstrip, token.single_word), []).append(token.content)
        return re.compile("|".join(_alternative(*kind, tokens) for kind, tokens in kinds.items()) or r"(?!)")

    def encode_all(self, texts: Sequence[str], *, starts: Sequence[bool] | None = None) -> list[list[int]]:
        encoded = self._encode_placed(texts, [True] * len(texts) if starts is None else starts)
        return [
            ids if self._special_ids.isdisjoint(ids) else self._encode_apart(text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if self._verbatim.keys().isdisjoint(ids):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))
        text = ""
        for word, run in groupby(ids, key=self._verbatim.get):
            run_ids = list(run)
            decoded = self._backend.decode(run_ids, skip_special_tokens=skip_special)
            text += decoded if word is None else word * len(run_ids)
        return text

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        rows = zip(texts, encoded, strict=True)
        return [index for index, row in enumerate(rows) if not self._survives(*row)]

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        window: list[int] = []
        shown = 0  # how many ids of the window have been shown already: they are context for the next
        for token_id in ids:
            window.append(token_id)
            text = self._tail(window, shown)
            if text and not text.endswith(_HALF_CHARACTER):
                yield text
                window, shown = window[shown:], len(window) - shown
        if rest := self._tail(window, shown):
            yield rest

    def rebuilt(self, parts: Mapping[str, Any]) -> FastTokenizer:
        """The same vocabulary with other parts, e.g. {"pre_tokenizer": ..., "decoder": ...}."""
        definition = {**json.loads(self._backend.to_str()), **parts}
        return _revived(json.dumps(definition), self.named, self.chat_template)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied backend forgets that control tokens are off in text: copies are made anew."""
        return _revived, (self._backend.to_str(), self.named, self.chat_template)

    def fingerprint(self) -> str:
        """Of the vocabulary as it is in use, so of a repaired one as repaired."""
        digest = hashlib.sha256(json.dumps([self.named, self.chat_template]).encode())
        digest.update(self._backend.to_str().encode())
        return digest.hexdigest()

    def _named_id(self, name: str) -> int | None:
        token = self.named.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"the vocabulary has no {name} {token!r}",
                why="tokenizer_config.json names it, tokenizer.json does not have it",
                fix="get both files of the model again: they do not belong together",
            )
        return int(token_id)

    def _encode_placed(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        if self._inner is self._backend:
            return self._encode_with(self._backend, texts)
        opening = iter(self._encode_with(self._backend, list(compress(texts, starts))))
        inside = iter(self._encode_with(self._inner, list(compress(texts, map(not_, starts)))))
        return [next(opening if start else inside) for start in starts]

    def _encode_with(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_apart(self, text: str) -> list[int]:
        """For vocabularies whose model itself knows a control token as a word: cut the word in two."""
        parts = _cut_inside(text, _words(self._special))
        ids = [token_id for part in self._encode_with(self._inner, parts) for token_id in part]
        if not self._special_ids.isdisjoint(ids):
            raise TokenizerError(
                "plain text would become a control token",
                where=repr(text[:60]),
                why="the tokenizer's model gives a control id even to a piece of a control token's text",
                fix="take the text out of the row, or check that tokenizer.json belongs to this model",
            )
        return ids

    def _survives(self, text: str, ids: Sequence[int]) -> bool:
        if self._unk_id is not None and self._unk_id in ids:
            return False
        decoded = self.decode(ids)
        same = (text, text.removeprefix(" "), f" {text}") if self._opens_with_space else (text,)
        if decoded in same:
            return True
        normalizer = self._backend.normalizer
        return normalizer is not None and normalizer.normalize_str(decoded) == normalizer.normalize_str(text)

    def _tail(self, window: Sequence[int], shown: int) -> str:
        return self.decode(window)[len(self.decode(window[:shown])) :]


def _revived(definition: str, named: Mapping[str, str], chat_template: str | None) -> FastTokenizer:
    backend = tokenizers.Tokenizer.from_str(definition)
    return FastTokenizer(backend, named=named, chat_template=chat_template)


def _without_extras(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_opening_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A twin for text inside a conversation, where the backend puts a space before the first text only."""
    if '"prepend_scheme":"first"' not in _parts_of(backend):
        return backend
    definition = json.loads(backend.to_str())
    opening = json.dumps(definition["pre_tokenizer"])
    never = opening.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    definition["pre_tokenizer"] = json.loads(never)
    return _without_extras(tokenizers.Tokenizer.from_str(json.dumps(definition)))


def _parts_of(backend: tokenizers.Tokenizer) -> str:
    return _state(backend.normalizer) + _state(backend.pre_tokenizer) + _state(backend.decoder)


def _uses_metaspace(backend: tokenizers.Tokenizer) -> bool:
    parts = _parts_of(backend)
    return "Metaspace" in parts or "▁" in parts


def _verbatim(backend: tokenizers.Tokenizer) -> dict[int, str]:
    """Added words that a ByteLevel decoder would take for bytes: DeepSeek's "ü" came back as byte 0xFC."""
    if "ByteLevel" not in _state(backend.decoder):
        return {}
    return {i: t.content for i, t in backend.get_added_tokens_decoder().items() if not t.special}


def _state(part: Any) -> str:
    return "" if part is None else str(part.__getstate__().decode())


def _unk_id(backend: tokenizers.Tokenizer) -> int | None:
    model = backend.model
    if isinstance(model, tokenizers.models.Unigram):  # the only one that does not tell its unk token
        found = json.loads(model.__getstate__())["unk_id"]
    else:
        found = backend.token_to_id(model.unk_token) if model.unk_token else None
    return None if found is None else int(found)


def _alternative(lstrip: bool, rstrip: bool, single_word: bool, tokens: Sequence[str]) -> str:
    before = (r"\s*" if lstrip else "") + (r"(?<!\w)" if single_word else "")
    after = (r"(?!\w)" if single_word else "") + (r"\s*" if rstrip else "")
    return f"{before}({_words(tokens)}){after}"


def _words(tokens: Iterable[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _cut_inside(text: str, words: str) -> list[str]:
    """`text` in parts, cut after the first character of every match of `words`."""
    cuts = [0, *(match.start() + 1 for match in re.finditer(f"(?=(?:{words}))", text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]
