from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers_factory as factory
from chat_texts import make_format

from lorasmith.errors import ConfigError, FamilyError
from lorasmith.families import all_families, chatglm3, deepseek, find_family, llama3, stop_ids_of
from lorasmith.text.loading import load_tokenizer

LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0}
DEEPSEEK = {"model_type": "llama", "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA3, "llama3"),
        ({**LLAMA3, "rope_scaling": None}, "llama3"),
        ({**LLAMA3, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "generic"),
        ({**LLAMA3, "rope_parameters": {"rope_type": "llama3"}}, "generic"),
        ({**LLAMA3, "rope_parameters": {"rope_type": "default"}}, "llama3"),
        (DEEPSEEK, "deepseek"),
        ({**DEEPSEEK, "vocab_size": 300}, "generic"),
        ({**LLAMA3, "vocab_size": 300}, "generic"),
        ({"model_type": "qwen2", "vocab_size": 151936}, "generic"),
        ({"model_type": "qwen3", "vocab_size": 151936}, "qwen3"),
        ({"model_type": "qwen3_moe", "vocab_size": 151936}, "qwen3"),
        ({"model_type": "glm", "vocab_size": 151552}, "glm4"),
        ({"model_type": "glm4", "vocab_size": 151552}, "glm4"),
        ({"model_type": "glm", "vocab_size": 59264}, "generic"),  # GLM-Edge
        ({"architectures": ["GemmaForCausalLM"]}, "generic"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}, "generic"),
        ({"model_type": "baichuan", "vocab_size": 125696}, "baichuan2"),
        ({"architectures": ["BaichuanForCausalLM"], "vocab_size": 128}, "baichuan2"),
        (
            {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 65024},
            "chatglm3",
        ),
        ({"architectures": ["ChatGLMForConditionalGeneration"], "padded_vocab_size": 128}, "chatglm3"),
        ({"architectures": ["TransnormerForCausalLM"], "auto_map": {"AutoModel": "x.y"}}, "transnormer"),
        ({"model_type": "transnormer"}, "transnormer"),
    ],
)
def test_auto_reads_config_json(config: dict[str, Any], name: str) -> None:
    assert find_family(config).name == name


def test_a_shrunk_config_may_be_named() -> None:
    assert find_family({"model_type": "llama", "vocab_size": 300}, "deepseek").name == "deepseek"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "baichuan", "vocab_size": 64000},  # Baichuan-1
        {"model_type": "chatglm", "padded_vocab_size": 151552},  # GLM-4 with remote code
        {"model_type": "chatglm", "vocab_size": 130528},  # ChatGLM-1
    ],
)
def test_relatives_that_live_by_remote_code_are_refused_with_what_they_say(config: dict[str, Any]) -> None:
    with pytest.raises(FamilyError, match="fits no family") as caught:
        find_family({**config, "auto_map": {"AutoModel": "evil.Model"}})
    assert all(str(value) in caught.value.why for value in config.values())
    assert "baichuan2, chatglm3, transnormer" in caught.value.fix


def test_a_name_goes_before_detection() -> None:
    assert find_family({"model_type": "chatglm"}, "chatglm3").name == "chatglm3"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(FamilyError) as caught:
        find_family(LLAMA3, "lama3")
    assert "did you mean 'llama3'?" in caught.value.fix
    assert all(family.name in caught.value.fix for family in all_families())


def test_a_config_that_says_nothing() -> None:
    with pytest.raises(FamilyError, match="fits no family") as caught:
        find_family({"auto_map": {}})
    assert "neither model_type nor architectures" in caught.value.why


def test_no_two_native_families_fit_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.families._NATIVE", (llama3.FAMILY, llama3.FAMILY))
    with pytest.raises(FamilyError, match="fits the families llama3 and llama3") as caught:
        find_family(LLAMA3)
    assert "model_type 'llama'" in caught.value.why


def test_a_format_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(factory.chatml(tmp_path))
    with pytest.raises(ConfigError, match="'tutorial'") as caught:
        find_family({"model_type": "qwen2"}).chat_format("tutorial", tokenizer)
    assert "official" in caught.value.why


@pytest.mark.parametrize(
    ("config", "ids"), [({}, ()), ({"eos_token_id": 2}, (2,)), ({"eos_token_id": [2, 5]}, (2, 5))]
)
def test_stop_ids_of_a_generation_config(config: dict[str, Any], ids: tuple[int, ...]) -> None:
    assert stop_ids_of(config) == ids


def test_stop_ids_of_the_native_families(tmp_path: Path) -> None:
    llama = make_format(tmp_path / "llama3", "llama3", "official")
    wanted = [llama.tokenizer.special_id(token) for token in ("<|eot_id|>", "<|end_of_text|>")]
    assert list(llama.stop_ids) == wanted
    deep = make_format(tmp_path / "deepseek", "deepseek", "tutorial")
    assert deep.stop_ids == (deep.tokenizer.eos_id,)
    assert deepseek.FAMILY.chat_format("official", deep.tokenizer, (9,)).stop_ids == (
        deep.tokenizer.eos_id,
        9,
    )
    chatglm = make_format(tmp_path / "chatglm3", "chatglm3", "official").tokenizer
    named = ("</s>", "<|user|>", "<|observation|>")
    chat_format = chatglm3.FAMILY.chat_format("official", chatglm, (2,))
    assert chat_format.stop_ids == tuple(map(chatglm.special_id, named))
