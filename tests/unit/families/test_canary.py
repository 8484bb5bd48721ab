from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers_factory as factory
from chat_texts import LIKE, REAL, make_format, real_directory

from lorasmith.errors import TokenizerError
from lorasmith.families import check_canary, checked_tokenizer, find_family
from lorasmith.families.canary import load_canary
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer

BYTE_LEVEL = ("llama3", "deepseek")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def real(shared: Path, directory: Path, family: str, **changes: Any) -> FastTokenizer:
    source = shared / "data/tokenizers" / REAL[family]
    shutil.copy(source, directory / "tokenizer.json")
    if changes:
        definition = json.loads(source.read_text(encoding="utf-8"))
        (directory / "tokenizer.json").write_text(json.dumps({**definition, **changes}), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


@pytest.mark.parametrize("family", REAL)
def test_the_real_vocabulary_passes(shared: Path, tmp_path: Path, family: str) -> None:
    directory = real_directory(shared, tmp_path, family)
    tokenizer = load_tokenizer(directory, find_family({}, family).special_pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked_tokenizer(find_family({}, family), tokenizer) is tokenizer


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_a_file_saved_with_metaspace_is_repaired(shared: Path, tmp_path: Path, family: str) -> None:
    damaged = real(shared, tmp_path, family, pre_tokenizer=METASPACE)
    assert damaged.decode(damaged.encode("你好 世界")) != "你好 世界"
    with pytest.warns(UserWarning, match="repaired the tokenizer"):
        repaired = checked_tokenizer(find_family({}, family), damaged)
    assert repaired.decode(repaired.encode("你好 世界")) == "你好 世界"
    check_canary(find_family({}, family), repaired)


def test_what_cannot_be_repaired_is_refused_with_string_and_ids(shared: Path, tmp_path: Path) -> None:
    definition = json.loads(
        (shared / "data/tokenizers/deepseek-llm/tokenizer.rebuilt.json").read_text(encoding="utf-8")
    )
    model = {**definition["model"], "merges": definition["model"]["merges"][:1000]}
    tokenizer = real(shared, tmp_path, "deepseek", model=model)
    with pytest.raises(TokenizerError, match="wrong ids for 'Hello, world!'") as caught:
        checked_tokenizer(find_family({}, "deepseek"), tokenizer)
    assert "trained with [17464, 11" in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("family", LIKE)
def test_a_small_vocabulary_must_only_lose_nothing(tmp_path: Path, family: str) -> None:
    tokenizer = make_format(tmp_path, family, "official").tokenizer
    assert checked_tokenizer(find_family({}, family), tokenizer) is tokenizer


def test_a_small_vocabulary_that_loses_text_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(factory.deepseek_like(tmp_path))
    assert isinstance(tokenizer, FastTokenizer)
    with pytest.raises(TokenizerError, match="loses text"):
        checked_tokenizer(find_family({}, "deepseek"), tokenizer.rebuilt({"pre_tokenizer": METASPACE}))


@pytest.mark.parametrize("family", ["baichuan2", "chatglm3"])
def test_a_tokenizer_model_of_another_model_is_refused(shared: Path, tmp_path: Path, family: str) -> None:
    """Same ids for what is special, other ids for text."""
    found = find_family({}, family)
    content = (real_directory(shared, tmp_path, family) / "tokenizer.model").read_bytes()
    other = SentencePieceTokenizer(content.replace(b"Hello", b"Hollo"), found.special_pieces)
    with pytest.raises(TokenizerError, match="wrong ids for 'Hello, world!'"):
        checked_tokenizer(found, other)


def test_strings_whose_ids_hang_on_an_unproven_normalizer_are_left_out() -> None:
    canary = load_canary(find_family({}, "transnormer"))
    assert canary
    assert len(canary.strings) >= 15
    assert all(text == text.strip() and "  " not in text for text, _ in canary.strings)


@pytest.mark.parametrize("family", [family for family in REAL if family != "transnormer"])
def test_the_strings_are_about_thirty_and_of_many_kinds(family: str) -> None:
    canary = load_canary(find_family({}, family))
    assert canary
    texts = "".join(text for text, _ in canary.strings)
    assert len(canary.strings) >= 30
    assert all(kind in texts for kind in ("你好", "🙂", "\t", "\r\n", "   ", "é", "def f", "0123"))


def test_the_generic_family_has_none(tmp_path: Path) -> None:
    check_canary(find_family({"model_type": "qwen3"}), load_tokenizer(factory.chatml(tmp_path)))
