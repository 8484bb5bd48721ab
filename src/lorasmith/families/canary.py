"""A canary sings at load: known strings must give known ids, or nothing that follows can be trusted.

transformers 5.x replaced the pre-tokenizer of DeepSeek's tokenizer.json and saved it so: every Chinese
character is then lost at encoding, and training goes on without a word.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lorasmith.errors import TokenizerError
from lorasmith.families.base import Family
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.tokenization.tokenizer import Tokenizer

_FIX = (
    "get the model's own tokenizer file again; a tokenizer.json that transformers 5 has saved may be damaged"
)


@dataclass(frozen=True)
class Canary:
    vocab_size: int
    special_ids: Mapping[str, int]
    strings: tuple[tuple[str, list[int]], ...]
    parts: Mapping[str, Any]
    """The known normalizer, pre_tokenizer and decoder of a tokenizer.json."""

    def is_about(self, tokenizer: Tokenizer) -> bool:
        """Whether this is the vocabulary whose ids are known, and not a small one made for tests."""
        return (
            tokenizer.vocab_size == self.vocab_size
            or self.special_ids.items() <= tokenizer.special_tokens.items()
        )


def load_canary(family: Family) -> Canary | None:
    if family.canary is None:
        return None
    text = (
        resources.files("lorasmith.families").joinpath("canaries", family.canary).read_text(encoding="utf-8")
    )
    tree = json.loads(text)
    strings = tuple((text, ids) for text, ids in tree["strings"])
    return Canary(tree["vocab_size"], tree["special_ids"], strings, tree.get("parts", {}))


def check_canary(family: Family, tokenizer: Tokenizer) -> None:
    """Known strings give the known ids; in another vocabulary they must at least come back.

    Raises: TokenizerError naming the first string that does not.
    """
    canary = load_canary(family)
    if canary is None:
        return
    texts = [text for text, _ in canary.strings]
    encoded = tokenizer.encode_all(texts)
    if canary.is_about(tokenizer):
        _check_ids(family, canary, tokenizer, encoded)
    for index in tokenizer.lost(texts, encoded):
        raise TokenizerError(
            f"the tokenizer loses text: {texts[index]!r} comes back as {tokenizer.decode(encoded[index])!r}",
            why=f"a vocabulary of the family {family.name} has a piece for every byte and loses nothing",
            fix=_FIX,
        )


def checked_tokenizer(family: Family, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, checked; a damaged one with a known vocabulary is rebuilt, with a warning.

    Raises: TokenizerError if it is damaged and rebuilding does not bring the known ids back.
    """
    try:
        check_canary(family, tokenizer)
    except TokenizerError as error:
        rebuilt = _rebuilt(family, tokenizer)
        if rebuilt is None:
            raise
        warnings.warn(f"repaired the tokenizer of {family.title}: {error.what}", stacklevel=2)
        return rebuilt
    return tokenizer


def _check_ids(family: Family, canary: Canary, tokenizer: Tokenizer, encoded: list[list[int]]) -> None:
    for token, wanted in canary.special_ids.items():
        if tokenizer.special_id(token) != wanted:
            raise _wrong_ids(family, token, [wanted], [tokenizer.special_id(token)])
    for (text, ids), got in zip(canary.strings, encoded, strict=True):
        if got != ids:
            raise _wrong_ids(family, text, ids, got)


def _rebuilt(family: Family, tokenizer: Tokenizer) -> Tokenizer | None:
    canary = load_canary(family)
    if canary is None or not isinstance(tokenizer, FastTokenizer) or not canary.is_about(tokenizer):
        return None
    rebuilt = tokenizer.rebuilt(canary.parts)
    try:
        check_canary(family, rebuilt)
    except TokenizerError:
        return None
    return rebuilt


def _wrong_ids(family: Family, text: str, wanted: list[int], got: list[int]) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer gives wrong ids for {text!r}",
        why=f"{family.title} was trained with {wanted}, this tokenizer gives {got}",
        fix=_FIX,
    )
