"""The two layouts of a model with a fused projection: its authors' names, and those of transformers.

Sources: the tensor tables of Baichuan2 and ChatGLM3 beside LlamaForCausalLM and GlmForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GlmConfig, LlamaConfig, PretrainedConfig

from lorasmith.errors import ConfigError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class NativeLayout:
    """How the modules of one model_type of ours are called in the class of transformers that computes it."""

    fused: str
    """Path inside a layer of the projection whose rows are those of q, k and v."""
    renames: tuple[tuple[str, str], ...]
    """Runs of whole path segments: theirs and transformers'."""
    config_class: type[PretrainedConfig]
    normed_head: bool
    """The head's rows are used at length one: a plain head must hold them so."""
    chat_template: str
    """The family's official chat format in jinja."""

    def native_name(self, path: str) -> str:
        """A module path of the original as transformers has it; the fused projection keeps its name."""
        return _renamed(path, self.renames)

    def original_name(self, path: str) -> str:
        return _renamed(path, tuple((new, old) for old, new in self.renames))

    def split_names(self, path: str) -> tuple[str, ...]:
        """Where q, k and v of the fused projection at `path` lie; none if `path` is another module."""
        if not f".{path}".endswith(f".{self.fused}"):
            return ()
        layer = self.native_name(path[: -len(self.fused)] + "self_attn")
        return tuple(f"{layer}.{name}" for name in PROJECTIONS)

    def native_config(self, config: PretrainedConfig, stop_ids: tuple[int, ...]) -> PretrainedConfig:
        """`stop_ids` as eos_token_id, where the chat format says more than the config."""
        tree: dict[str, Any] = {name: getattr(config, name) for name in _SIZES}
        has_bias = bool(getattr(config, "attention_bias", False))
        return self.config_class(
            **tree,
            attention_bias=has_bias,
            attention_dropout=0.0,
            hidden_act="silu",
            tie_word_embeddings=config.tie_word_embeddings and not self.normed_head,
            eos_token_id=_one_or_all(stop_ids) if stop_ids else config.eos_token_id,
        )


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
    *("rope_parameters", "pad_token_id", "bos_token_id"),
)

_BAICHUAN2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<reserved_106>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<reserved_107>' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)
_CHATGLM3_TEMPLATE = (  # the space stands for the one that sentencepiece puts in front of every text
    "{{ '[gMASK]sop' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['content'] %}{{ ' ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)

_BAICHUAN2 = NativeLayout(
    fused="self_attn.W_pack",
    renames=(),
    config_class=LlamaConfig,
    normed_head=True,
    chat_template=_BAICHUAN2_TEMPLATE,
)
_CHATGLM3 = NativeLayout(
    fused="self_attention.query_key_value",
    renames=(
        ("transformer.encoder.layers", "model.layers"),
        ("transformer.encoder.final_layernorm", "model.norm"),
        ("transformer.embedding.word_embeddings", "model.embed_tokens"),
        ("transformer.output_layer", "lm_head"),
        ("self_attention.dense", "self_attn.o_proj"),
        ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
        ("mlp.dense_4h_to_h", "mlp.down_proj"),
    ),
    config_class=GlmConfig,
    normed_head=False,
    chat_template=_CHATGLM3_TEMPLATE,
)
_BY_ORIGINAL: Mapping[str, NativeLayout] = {"baichuan": _BAICHUAN2, "chatglm": _CHATGLM3}
_BY_NATIVE: Mapping[str, NativeLayout] = {"llama": _BAICHUAN2, "glm": _CHATGLM3}


def native_layout(config: PretrainedConfig) -> NativeLayout | None:
    """The way to the native class; None for a model that is of a class of transformers already.

    Raises: ConfigError for a model that no class of transformers computes.
    """
    if config.model_type == "transnormer":
        raise ConfigError(
            "TransNormerLLM has no native layout",
            why="no class of transformers computes its linear attention",
            fix="merge with --layout original",
        )
    if getattr(config, "uses_alibi", False):
        raise ConfigError(
            "Baichuan2-13B has no native layout",
            why="it has ALiBi, a bias by distance that LlamaForCausalLM does not compute",
            fix="merge with --layout original",
        )
    return _BY_ORIGINAL.get(config.model_type)


def layout_around(config: PretrainedConfig, *, to: str) -> NativeLayout:
    """The layout pair that an adapter trained on `config`'s model crosses. `to` is "split" or "fused".

    Raises: ConfigError if that model has nothing to cut or to join.
    """
    found = native_layout(config) if to == "split" else _BY_NATIVE.get(config.model_type)
    if found is None:
        wanted = "Baichuan2 or ChatGLM3" if to == "split" else "one of their native (Llama or Glm) layouts"
        raise ConfigError(
            f"an adapter of a {config.model_type} model cannot be made {to}",
            why=f"only adapters of {wanted} are converted to {to}",
            fix="name the model that the adapter was trained on with --base",
        )
    return found


def projection_rows(config: PretrainedConfig) -> tuple[int, int, int]:
    """Rows of q, k and v. A layout's two configs give the same."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return queries, keys, keys


def _renamed(path: str, pairs: tuple[tuple[str, str], ...]) -> str:
    dotted = f".{path}."
    for old, new in pairs:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
