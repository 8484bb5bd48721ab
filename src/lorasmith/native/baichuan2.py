"""Baichuan2 as transformers' Llama with a fused projection, a NormHead and, in the 13B, ALiBi for RoPE.

Modules carry the names of the original checkpoint, so weights and adapters need no mapping.
Shapes: B = rows of a batch, T = tokens, C = columns of W_pack, D = hidden size, H = heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    StaticCache,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

from lorasmith.attention.alibi import alibi_mask, alibi_slopes
from lorasmith.attention.layout import biased_attention_interface, with_alibi
from lorasmith.attention.rotary import rotary
from lorasmith.errors import FamilyError
from lorasmith.native.fused_attention import attend_fused, fused_width
from lorasmith.native.norm_head import NormHead

_BAICHUAN1_VOCAB = 64000
"""Baichuan 1 has the same model_type and tensor names, but a plain head: its vocabulary tells them apart."""

_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class Baichuan2Config(PretrainedConfig):
    """The original config.json by its own keys. One with `max_position_embeddings` has RoPE (7B), one without
    has ALiBi (13B).

    Raises: FamilyError for Baichuan 1 and for a z-loss, which is not computed here.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        *,
        vocab_size: int = 125696,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int | None = None,
        model_max_length: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        z_loss_weight: float = 0,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.z_loss_weight = vocab_size, z_loss_weight
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.model_max_length = max_position_embeddings, model_max_length
        self.hidden_act, self.initializer_range = hidden_act, initializer_range
        self.rms_norm_eps, self.rope_parameters = rms_norm_eps, rope_parameters
        self._refuse_relatives()
        # the 13B stores a 1-tuple, which is always true; the run says what is recomputed, not this file
        kwargs["gradient_checkpointing"] = False
        super().__init__(**{**_DEFAULTS, **kwargs})

    def _refuse_relatives(self) -> None:
        if self.vocab_size == _BAICHUAN1_VOCAB:
            raise FamilyError(
                "this is Baichuan 1, which has no native port",
                why="its head is not normalised, so that as Baichuan2 it would give wrong answers",
                fix="use a Baichuan2 model",
            )
        if self.z_loss_weight:
            raise FamilyError(
                f"config.json asks for a z-loss (z_loss_weight {self.z_loss_weight})",
                why="training here would leave it out; the published Baichuan2 models have 0",
                fix="set z_loss_weight to 0",
            )

    def to_dict(self) -> dict[str, Any]:
        """As the original file has it: by its own class, and without positions where there is ALiBi."""
        tree = {**super().to_dict(), "architectures": ["BaichuanForCausalLM"]}
        if self.uses_alibi:
            tree.pop("max_position_embeddings", None)
        return tree

    @property
    def uses_alibi(self) -> bool:
        return self.max_position_embeddings is None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def mlp_bias(self) -> bool:
        """Asked for by Llama's feed-forward."""
        return False


class Baichuan2RotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines that stay fp32 in a 16-bit model."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        cos, sin = super().forward(wide, position_ids)
        return cos, sin


class NoRotation(nn.Module):
    """In the place of RoPE where ALiBi works inside the attention mask."""

    def forward(self, x: Tensor, position_ids: Tensor) -> None:
        return None


class Baichuan2Attention(LlamaAttention):
    def __init__(self, config: Baichuan2Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Llama's own would make three projections
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.W_pack = nn.Linear(config.hidden_size, fused_width(config), bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rotation, eager = None, biased_attention_interface
        if position_embeddings is not None:
            cos, sin = position_embeddings
            rotation, eager = partial(rotary, cos_BTR=cos, sin_BTR=sin), eager_attention_forward
        packed_BTC = self.W_pack(hidden_states)
        out_BTD, weights = attend_fused(
            self, packed_BTC, rotation, attention_mask, past_key_values, eager=eager, **kwargs
        )
        return self.o_proj(out_BTD), weights


class Baichuan2DecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: Baichuan2Config, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = Baichuan2Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _has_no_bias(model: LlamaPreTrainedModel) -> bool:
    """With ALiBi "eager" is our own attention; sdpa on a GPU misreads an fp32 bias beside 16-bit queries."""
    return not model.config.uses_alibi


class Baichuan2Model(LlamaModel):
    config_class = Baichuan2Config
    _no_split_modules: ClassVar[list[str]] = ["Baichuan2DecoderLayer"]
    _supports_flash_attn = False  # neither takes ALiBi's bias; sdpa runs the same kernels for the 7B
    _supports_flex_attn = False
    _supports_sdpa = property(_has_no_bias)

    def __init__(self, config: Baichuan2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = [Baichuan2DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = NoRotation() if config.uses_alibi else Baichuan2RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.uses_alibi and (layout := kwargs.get("layout")) is not None:
            kwargs["layout"] = with_alibi(layout, self._slopes_H(inputs_embeds))
        elif self.config.uses_alibi:
            attention_mask = self._alibi_mask(inputs_embeds, attention_mask, past_key_values)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _slopes_H(self, x: Tensor) -> Tensor:
        """No buffer, which a cast of the module to 16 bits would round."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.tensor(alibi_slopes(self.config.num_attention_heads), dtype=dtype, device=x.device)

    def _alibi_mask(
        self, x_BTD: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """Made once for all layers: (1 or B, H, T, keys)."""
        num_queries = x_BTD.shape[1]
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        num_keys = past + num_queries
        if isinstance(past_key_values, StaticCache):
            num_keys = past_key_values.layers[0].max_cache_len
        return alibi_mask(
            self._slopes_H(x_BTD), attention_mask, num_queries=num_queries, num_keys=num_keys, past=past
        )


class Baichuan2ForCausalLM(LlamaForCausalLM):
    config_class = Baichuan2Config
    _no_split_modules: ClassVar[list[str]] = ["Baichuan2DecoderLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_sdpa = property(_has_no_bias)
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]
    _tp_plan = None
    _pp_plan = None

    def __init__(self, config: Baichuan2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = Baichuan2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NormHead):
            initialization.normal_(module.weight, std=self.config.initializer_range)
