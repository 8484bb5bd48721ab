"""Law 8: text of the user never yields a special token id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_texts import FORMATS, REAL, make_format, real_format

from lorasmith.testing import LawBroken
from lorasmith.testing.chat_laws import no_special_from_joined_text, no_special_from_text
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.sentencepiece_model import SpecialPieces

ROWS = 2000


@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_small_vocabularies(tmp_path: Path, family: str, name: str) -> None:
    no_special_from_text(make_format(tmp_path, family, name), ROWS // 5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_small_vocabularies_at_length(tmp_path: Path, family: str, name: str) -> None:
    no_special_from_text(make_format(tmp_path, family, name), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_halves_that_meet(tmp_path: Path, family: str, name: str) -> None:
    no_special_from_joined_text(make_format(tmp_path, family, name), ROWS // 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", REAL)
def test_halves_that_meet_in_real_vocabularies(shared: Path, tmp_path: Path, family: str) -> None:
    no_special_from_joined_text(real_format(shared, tmp_path, family, "official"), ROWS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("name", ["official", "tutorial"])
def test_real_vocabularies(shared: Path, tmp_path: Path, family: str, name: str) -> None:
    no_special_from_text(real_format(shared, tmp_path, family, name), ROWS)


def test_role_markers_that_are_not_flagged_special(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "marked", "official")
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert not next(token for token in tokens if token["content"] == "<|user|>")["special"]
    assert "<|user|>" in chat_format.tokenizer.special_tokens
    assert chat_format.tokenizer.special_id("<|user|>") not in chat_format.tokenizer.encode("<|user|>")


def test_a_tokenizer_that_parses_them_breaks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_format = make_format(tmp_path, "baichuan2", "official")
    as_the_file_says = load_tokenizer(tmp_path, SpecialPieces())
    monkeypatch.setattr(chat_format.tokenizer, "encode_all", as_the_file_says.encode_all)
    with pytest.raises(LawBroken, match="never yields a special token id"):
        no_special_from_text(chat_format)


@pytest.mark.parametrize("family", ["baichuan2", "transnormer"])
def test_what_the_file_lets_text_spell_is_reserved_or_harmless(
    shared: Path, tmp_path: Path, family: str
) -> None:
    tokenizer = real_format(shared, tmp_path, family, "official").tokenizer
    assert {"<reserved_106>", "<SEP>", "<CLS>", "<s>", "</s>", "<unk>"} <= set(tokenizer.special_tokens)
    assert tokenizer.decode(tokenizer.encode("<p>\n\t</p>")) == "<p>\n\t</p>"
    assert not {"<p>", "\n", "\t"} & set(tokenizer.special_tokens)
