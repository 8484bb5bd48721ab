"""Ids and labels of the real vocabularies: the reference implementations' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_texts import REAL, real_directory

from lorasmith.families import checked_tokenizer, find_family
from lorasmith.families.opening import open_chat
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Conversation, Message

NAMES_OF_DATA = {
    "deepseek": "deepseek_llm",
    "transnormer": "transnormer(rebuilt vocab; official SFT train.py format)",
}
CASES = ["single", "system", "multi3", "empty_system", "mixed"]
CONTROLS_IN_ATTACK = {
    "llama3": [128000, 128006, 128007, 128009, 128006, 128007],
    "deepseek": [100000],
    "baichuan2": [195, 196],
    "chatglm3": [64790, 64792, 64795, 64796],
    "transnormer": [],
}
"""The special ids that the format itself writes, up to the last token, which is not an input."""
TOKENS_OF_HUANHUAN = {
    "llama3": 238_936,
    "deepseek": 201_106,
    "baichuan2": 158_151,
    "chatglm3": 196_693,
    "transnormer": 205_480,
}


@pytest.fixture(scope="module", params=list(REAL))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(shared: Path, family: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory, found = tmp_path_factory.mktemp(family), find_family({}, family)
    tokenizer = load_tokenizer(real_directory(shared, directory, family), found.special_pieces)
    return checked_tokenizer(found, tokenizer)


def format_of(family: str, name: str, tokenizer: Tokenizer) -> ChatFormat:
    return find_family({}, family).chat_format(name, tokenizer)


def conversation(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(Message(m["role"], m["content"]) for m in messages), "row")


@pytest.mark.parametrize("case", CASES)
def test_official(shared: Path, family: str, tokenizer: Tokenizer, case: str) -> None:
    golden = json.loads((shared / f"golden/tokenization/{family}_official.json").read_text(encoding="utf-8"))
    wanted = next(c for c in golden["conversations"] if c["name"] == case)
    wanted.update(wanted.get("unofficial_extension", {}))
    chat_format, whole = format_of(family, "official", tokenizer), conversation(wanted["messages"])
    example = chat_format.encode(whole)
    assert example.input_ids.tolist() == wanted["full_ids"][:-1]
    assert example.labels.tolist() == wanted["labels"][1:]
    prompt = chat_format.encode(Conversation(whole.messages[:-1], "row"), for_generation=True)
    if wanted["prompt_ids"] is not None:
        assert prompt.input_ids.tolist() == wanted["prompt_ids"]


def test_attack(shared: Path, family: str, tokenizer: Tokenizer) -> None:
    """Where a reference parses control tokens out of user text, we do not follow it."""
    golden = json.loads((shared / f"golden/tokenization/{family}_official.json").read_text(encoding="utf-8"))
    wanted = next(c for c in golden["conversations"] if c["name"] == "attack")
    ids = format_of(family, "official", tokenizer).encode(conversation(wanted["messages"])).input_ids.tolist()
    if family in ("llama3", "chatglm3"):
        assert ids == wanted["full_ids"][:-1]
    special = set(tokenizer.special_tokens.values())
    assert [i for i in ids if i in special] == CONTROLS_IN_ATTACK[family]


def test_tutorial(shared: Path, family: str, tokenizer: Tokenizer) -> None:
    golden = json.loads((shared / f"golden/tokenization/{family}_tutorial.json").read_text(encoding="utf-8"))
    chat_format = format_of(family, "tutorial", tokenizer)
    assert len(golden["rows"]) >= 20
    for row in golden["rows"]:
        messages = (Message("user", row["instruction"] + row["input"]), Message("assistant", row["output"]))
        example = chat_format.encode(Conversation(messages, f"row {row['row']}"))
        assert example.input_ids.tolist() == row["input_ids"][:-1]
        assert example.labels.tolist() == row["labels"][1:]


@pytest.mark.parametrize("case", ["single", "multi_with_system"])
def test_official_templates(shared: Path, family: str, tokenizer: Tokenizer, case: str) -> None:
    data = json.loads((shared / "data/official_templates.json").read_text(encoding="utf-8"))
    wanted = data[NAMES_OF_DATA.get(family, family)]
    if case not in wanted:
        pytest.skip("the reference has single turns only")
    whole = conversation(data["messages"][case])
    chat_format = format_of(family, "official", tokenizer)
    assert chat_format.encode(whole).input_ids.tolist() == wanted[case]["ids"][:-1]
    if f"{case}_prompt" in wanted:
        prompt = chat_format.encode(Conversation(whole.messages[:-1], "row"), for_generation=True)
        assert prompt.input_ids.tolist() == wanted["single_prompt"]


@pytest.mark.parametrize("case", ["baichuan2_7b_a", "baichuan2_13b_alibi", "chatglm3_a", "transnormer_7b"])
def test_a_model_directory_as_its_authors_published_it(shared: Path, tmp_path: Path, case: str) -> None:
    """config.json under their own key names, tokenizer.model, and an auto_map that is not followed."""
    family = case.split("_")[0]
    (tmp_path / "config.json").symlink_to(shared / f"golden/models/{case}/config.json")
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    found, chat_format = open_chat(real_directory(shared, tmp_path, family))
    assert (found.name, chat_format.name) == (family, "official")
    content = (tmp_path / "tokenizer.model").read_bytes()
    assert isinstance(chat_format.tokenizer, SentencePieceTokenizer)
    assert chat_format.tokenizer.files == {"tokenizer.model": content}


def test_no_row_of_a_real_data_set_is_lost(shared: Path, family: str, tokenizer: Tokenizer) -> None:
    rows = json.loads((shared / "data/datasets/huanhuan.json").read_text(encoding="utf-8"))
    messages = [(Message("user", r["instruction"]), Message("assistant", r["output"])) for r in rows]
    examples = format_of(family, "official", tokenizer).encode_all([Conversation(m, "row") for m in messages])
    assert sum(len(example) + 1 for example in examples) == TOKENS_OF_HUANHUAN[family]
