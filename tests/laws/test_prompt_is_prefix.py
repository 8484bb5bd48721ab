"""Law 7: the prompt of generation is, id by id, the prefix of what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_texts import FORMATS, REAL, make_format, real_format

from lorasmith.testing import LawBroken
from lorasmith.testing.chat_laws import prompt_is_prefix


@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_small_vocabularies(tmp_path: Path, family: str, name: str) -> None:
    prompt_is_prefix(make_format(tmp_path, family, name))


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("name", ["official", "tutorial"])
def test_real_vocabularies(shared: Path, tmp_path: Path, family: str, name: str) -> None:
    prompt_is_prefix(real_format(shared, tmp_path, family, name))


def test_a_format_whose_prompt_is_another_breaks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_format = make_format(tmp_path, "baichuan2", "official")
    whole = chat_format.pieces
    monkeypatch.setattr(
        chat_format, "pieces", lambda messages, for_generation=False: whole(messages)
    )  # the prompt lacks its last token
    with pytest.raises(LawBroken, match="prefix of what was trained"):
        prompt_is_prefix(chat_format)
