"""ChatGLM3 as transformers' Glm with a fused projection, under the names of its original checkpoint.

Glm's forward passes are inherited; properties show them the modules by Glm's names.
Shapes: B = rows of a batch, T = tokens, C = columns of query_key_value, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GlmForCausalLM, GlmModel, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm.modeling_glm import (
    GlmAttention,
    GlmDecoderLayer,
    GlmMLP,
    GlmPreTrainedModel,
    GlmRMSNorm,
    GlmRotaryEmbedding,
    eager_attention_forward,
)

from lorasmith.attention.rotary import rotary
from lorasmith.errors import FamilyError
from lorasmith.native.fused_attention import attend_fused, fused_width

_COMPUTED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "quantization_bit": 0,
    "rmsnorm": True,
    "rope_ratio": 1,
}
"""Switches of the original code that ChatGLM3-6B leaves in this position, and the port with it. Others of the
same model_type turn them: chatglm3-6b-32k and glm-4-9b have a rope_ratio, a p-tuned model a pre_seq_len."""

_DEFAULTS = {
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class ChatGLM3Config(PretrainedConfig):
    """The original config.json by its own keys; transformers finds them by its own names too.

    Raises: FamilyError for a switch that would make it another model than ChatGLM3.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        "attention_bias": "add_qkv_bias",
    }

    def __init__(
        self,
        *,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        multi_query_group_num: int = 2,
        seq_length: int = 8192,
        layernorm_epsilon: float = 1e-5,
        add_qkv_bias: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_layers, self.padded_vocab_size, self.seq_length = num_layers, padded_vocab_size, seq_length
        self.hidden_size, self.ffn_hidden_size, self.kv_channels = hidden_size, ffn_hidden_size, kv_channels
        self.num_attention_heads = num_attention_heads
        self.multi_query_group_num = multi_query_group_num
        self.layernorm_epsilon, self.add_qkv_bias = layernorm_epsilon, add_qkv_bias
        self.rope_parameters = rope_parameters
        _refuse_relatives(kwargs)
        super().__init__(**{**_DEFAULTS, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """With the class of the original file, by which other programs know the layout."""
        return {**super().to_dict(), "architectures": ["ChatGLMModel"]}


def _refuse_relatives(config_json: Mapping[str, Any]) -> None:
    for key, value in _COMPUTED.items():
        if config_json.get(key, value) != value:
            raise FamilyError(
                f"config.json has {key} {config_json[key]!r}, and ChatGLM3 is computed with {value!r}",
                fix="use ChatGLM3-6B, or a model of another model_type",
            )


class ChatGLM3RotaryEmbedding(GlmRotaryEmbedding):
    """Cosines and sines that stay fp32 in a 16-bit model."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        cos, sin = super().forward(wide, position_ids)
        return cos, sin


class ChatGLM3Attention(GlmAttention):
    def __init__(self, config: ChatGLM3Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Glm's own would make three projections
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.kv_channels, config.kv_channels**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        width = config.num_attention_heads * config.kv_channels
        self.query_key_value = nn.Linear(config.hidden_size, fused_width(config), bias=config.add_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = position_embeddings
        rotation, eager = partial(rotary, cos_BTR=cos, sin_BTR=sin, interleaved=True), eager_attention_forward
        packed_BTC = self.query_key_value(hidden_states)
        out_BTD, weights = attend_fused(
            self, packed_BTC, rotation, attention_mask, past_key_values, eager=eager, **kwargs
        )
        return self.dense(out_BTD), weights


class ChatGLM3MLP(GlmMLP):
    def __init__(self, config: ChatGLM3Config) -> None:
        nn.Module.__init__(self)
        self.config, self.activation_fn = config, F.silu
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    @property
    def gate_up_proj(self) -> nn.Module:
        return self.dense_h_to_4h

    @property
    def down_proj(self) -> nn.Module:
        return self.dense_4h_to_h


class ChatGLM3Block(GlmDecoderLayer):
    def __init__(self, config: ChatGLM3Config, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attention = ChatGLM3Attention(config, layer_idx)
        self.mlp = ChatGLM3MLP(config)
        self.input_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_attention_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    @property
    def self_attn(self) -> nn.Module:
        return self.self_attention


class ChatGLM3Embedding(nn.Module):
    def __init__(self, config: ChatGLM3Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLM3Encoder(nn.Module):
    def __init__(self, config: ChatGLM3Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ChatGLM3Block(config, index) for index in range(config.num_layers)])
        self.final_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLM3Model(GlmModel):
    """The trunk; the head lies in it, as in the original."""

    config_class = ChatGLM3Config
    base_model_prefix = "transformer"
    _no_split_modules: ClassVar[list[str]] = ["ChatGLM3Block"]

    def __init__(self, config: ChatGLM3Config) -> None:
        GlmPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.padded_vocab_size
        self.gradient_checkpointing = False
        self.embedding = ChatGLM3Embedding(config)
        self.rotary_pos_emb = ChatGLM3RotaryEmbedding(config)
        self.encoder = ChatGLM3Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:
        return self.embedding.word_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def norm(self) -> nn.Module:
        return self.encoder.final_layernorm

    @property
    def rotary_emb(self) -> nn.Module:
        return self.rotary_pos_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value


class ChatGLM3ForCausalLM(GlmForCausalLM):
    config_class = ChatGLM3Config
    base_model_prefix = "transformer"
    _no_split_modules: ClassVar[list[str]] = ["ChatGLM3Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_pos_emb\.inv_freq$"]
    _tp_plan = None
    _pp_plan = None

    def __init__(self, config: ChatGLM3Config) -> None:
        GlmPreTrainedModel.__init__(self, config)
        self.transformer = ChatGLM3Model(config)
        self.vocab_size = config.padded_vocab_size
        self.post_init()

    @property
    def model(self) -> ChatGLM3Model:
        return self.transformer

    @property
    def lm_head(self) -> nn.Module:
        return self.transformer.output_layer

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings
