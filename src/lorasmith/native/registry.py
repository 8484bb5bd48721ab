"""The models that live elsewhere as remote code only, told to transformers under their original names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lorasmith.native.baichuan2 import Baichuan2Config, Baichuan2ForCausalLM
from lorasmith.native.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from lorasmith.native.transnormer import TransNormerConfig, TransNormerForCausalLM


class NativeModel(NamedTuple):
    """One of our own model classes and how an original config.json names it."""

    model_type: str
    architectures: tuple[str, ...]
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]


NATIVE_MODELS: tuple[NativeModel, ...] = (
    NativeModel(
        "baichuan", ("BaichuanForCausalLM", "BaiChuanForCausalLM"), Baichuan2Config, Baichuan2ForCausalLM
    ),
    NativeModel(
        "chatglm", ("ChatGLMModel", "ChatGLMForConditionalGeneration"), ChatGLM3Config, ChatGLM3ForCausalLM
    ),
    NativeModel("transnormer", ("TransnormerForCausalLM",), TransNormerConfig, TransNormerForCausalLM),
)


def register_native() -> None:
    """Make AutoConfig and AutoModelForCausalLM build our classes; a second call changes nothing."""
    for model_type, _, config_class, model_class in NATIVE_MODELS:
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def native_model_type(config_json: Mapping[str, Any]) -> str | None:
    """The model_type of ours that a config.json speaks of, by its own or, where it has none, by its
    architectures; None for any other model. `auto_map` is never followed."""
    said, architectures = config_json.get("model_type"), set(config_json.get("architectures") or ())
    for native in NATIVE_MODELS:
        if said == native.model_type or (said is None and architectures & set(native.architectures)):
            return native.model_type
    return None
