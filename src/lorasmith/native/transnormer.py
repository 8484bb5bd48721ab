"""TransNormerLLM as a native transformers model, under the names of the original checkpoints.

Qin et al. 2023, "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer"
(arXiv 2307.14995). A layer is linear attention with a decay per head and layer, and a gated linear unit
without activation, each behind an RMS norm without weights.

Shapes: B = rows of a batch, T = tokens, M = model width, H = heads, D = head size, F = features of queries
and keys (D, and 2 D under LRPE), L = layers, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lorasmith.attention.alibi import alibi_slopes
from lorasmith.attention.decay import ChunkIndex, decay_attention, decay_step, rows_index
from lorasmith.attention.layout import LayoutIndex
from lorasmith.errors import FamilyError
from lorasmith.native.recurrent_cache import RecurrentCache

_NORM_EPS = 1e-6


class TransNormerConfig(PretrainedConfig):
    """The keys of the original config.json, which says nothing of tying: without a word the head is tied.

    Raises: FamilyError for a variant of the architecture that no published model has.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  # transformers' own shape
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "max_position_embeddings": "model_max_length",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        *,
        vocab_size: int = 64000,
        decoder_embed_dim: int = 1024,
        decoder_layers: int = 24,
        decoder_attention_heads: int = 8,
        hidden_dim: int = 1024,
        glu_dim: int = 2816,
        no_scale_embedding: bool = False,
        linear_use_lrpe_list: Sequence[int] | None = None,
        linear_act_fun: str = "swish",
        norm_type: str = "simplermsnorm",
        bias: bool = False,
        init_std: float = 0.02,
        model_max_length: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.hidden_dim = hidden_dim
        self.glu_dim = glu_dim
        self.no_scale_embedding = no_scale_embedding
        self.linear_use_lrpe_list = list(linear_use_lrpe_list or [1, *[0] * (decoder_layers - 1)])
        self.linear_act_fun = linear_act_fun
        self.norm_type = norm_type
        self.bias = bias
        self.init_std = init_std
        self.model_max_length = model_max_length
        self.use_cache = use_cache
        _require_known_variant(self)
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )


def _require_known_variant(config: TransNormerConfig) -> None:
    known = {"linear_act_fun": ("swish", "silu"), "norm_type": ("simplermsnorm",), "bias": (False,)}
    for key, values in known.items():
        if getattr(config, key) not in values:
            raise FamilyError(
                f"TransNormerLLM with {key} = {getattr(config, key)!r} is not known here",
                why=f"all published models have {values[0]!r}",
            )
    if len(config.linear_use_lrpe_list) != config.decoder_layers:
        raise FamilyError(
            f"linear_use_lrpe_list has {len(config.linear_use_lrpe_list)} entries for "
            f"{config.decoder_layers} layers"
        )
    if config.hidden_dim % config.decoder_attention_heads:
        raise FamilyError("hidden_dim is no multiple of decoder_attention_heads")


def layer_decays(config: TransNormerConfig) -> list[list[float]]:
    """s of each layer and head: ALiBi's slope times 1 - l / (L - 1) + 1e-5; the last layer hardly forgets."""
    slopes, last = alibi_slopes(config.decoder_attention_heads), max(config.decoder_layers - 1, 1)
    return [[slope * (1 - layer / last + 1e-5) for slope in slopes] for layer in range(config.decoder_layers)]


def simple_rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, computed in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _NORM_EPS)).to(x.dtype)


class Lrpe(nn.Module):
    """Linearised relative position encoding: [x cos(theta t), x sin(theta t)], whose products depend on
    differences of positions alone. Phases are fp32 at least: bf16 has no integers above 256."""

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_size))

    def first_theta(self) -> Tensor:
        """10000^(-2 j / (H D)), counted through the heads."""
        exponents = torch.arange(self.theta.numel(), dtype=torch.float64) * (-2 / self.theta.numel())
        return torch.pow(10000.0, exponents).view(self.theta.shape)

    def forward(self, x_BTHD: Tensor, positions_BT: Tensor) -> Tensor:
        theta_HD = self.theta[:, 0].to(torch.promote_types(self.theta.dtype, torch.float32))
        phase_BTHD = positions_BT[..., None, None] * theta_HD
        return torch.cat([x_BTHD * phase_BTHD.cos(), x_BTHD * phase_BTHD.sin()], dim=-1)


class DecayedAttention(nn.Module):
    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.decoder_attention_heads
        self.qkvu_proj = nn.Linear(config.decoder_embed_dim, 4 * config.hidden_dim, bias=False)
        self.out_proj = nn.Linear(config.hidden_dim, config.decoder_embed_dim, bias=False)
        uses_lrpe = config.linear_use_lrpe_list[layer]
        self.lrpe = Lrpe(self.num_heads, config.hidden_dim // self.num_heads) if uses_lrpe else None

    def forward(
        self,
        x_BTM: Tensor,
        decay_H: Tensor,
        positions_BT: Tensor,
        real_BT: Tensor | None,
        index: ChunkIndex | None,
        cache: RecurrentCache | None,
    ) -> Tensor:
        q, k, v, gate = self.qkvu_proj(x_BTM).chunk(4, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (F.silu(q), F.silu(k), v))
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions_BT), self.lrpe(k, positions_BT)
        if real_BT is not None:
            v = v * real_BT[..., None, None]
        out_BTHD = self._attend(q, k, v, decay_H, index, cache)
        normed = simple_rms_norm(out_BTHD.flatten(2)).to(gate.dtype)
        return self.out_proj(gate * normed)

    def _attend(
        self,
        q_BTHF: Tensor,
        k_BTHF: Tensor,
        v_BTHD: Tensor,
        decay_H: Tensor,
        index: ChunkIndex | None,
        cache: RecurrentCache | None,
    ) -> Tensor:
        """Through the chunks of `index`; without one, a single step from the cache's state."""
        state = cache.states[self.layer] if cache is not None else None
        if index is None:
            assert state is not None
            out_BHD, state = decay_step(q_BTHF[:, 0], k_BTHF[:, 0], v_BTHD[:, 0], decay_H, state)
            out_BTHD = out_BHD[:, None]
        else:
            q, k, v = (x.flatten(0, 1) for x in (q_BTHF, k_BTHF, v_BTHD))
            out, state = decay_attention(q, k, v, decay_H, index, state)
            out_BTHD = out.view_as(v_BTHD)
        if cache is not None:
            cache.states[self.layer] = state
        return out_BTHD


class GatedLinearUnit(nn.Module):
    """l3(l1(x) * l2(x)), without activation."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.l3(self.l1(x_BTM) * self.l2(x_BTM))


class TransNormerLayer(GradientCheckpointingLayer):
    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.token_mixer = DecayedAttention(config, layer)
        self.channel_mixer = GatedLinearUnit(config)

    def forward(
        self,
        x_BTM: Tensor,
        decay_H: Tensor,
        positions_BT: Tensor,
        real_BT: Tensor | None,
        index: ChunkIndex | None,
        past_key_values: RecurrentCache | None = None,
    ) -> Tensor:
        normed = simple_rms_norm(x_BTM)
        x_BTM = x_BTM + self.token_mixer(normed, decay_H, positions_BT, real_BT, index, past_key_values)
        return x_BTM + self.channel_mixer(simple_rms_norm(x_BTM))


class TransNormerPreTrainedModel(PreTrainedModel):
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TransNormerLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = frozenset({"lrpe"})
    _supports_attention_backend = True  # its layers read `layout`, which is what packed training asks for
    _is_stateful = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the name changes nothing: the layers go by `layout` alone

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Lrpe):
            init.copy_(module.theta, module.first_theta())


class TransNormerModel(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.layers = nn.ModuleList(TransNormerLayer(config, layer) for layer in range(config.decoder_layers))
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        layout: LayoutIndex | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """`layout` tells the segments of one flat row. `hidden_states` are the input of every layer, and the
        normed output of the last.

        Raises: ValueError for both or neither of input_ids and inputs_embeds, for a mask that is not (B, T),
        or for a cache of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTM = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x_BTM = x_BTM * self.embed_scale
        cache = self._cache(past_key_values, use_cache)
        positions_BT = _positions(x_BTM, cache) if position_ids is None else position_ids
        real_BT, index = _real(x_BTM, attention_mask), _index(x_BTM, cache, layout)
        decays_LH = torch.tensor(layer_decays(self.config), device=x_BTM.device)
        seen = []
        for layer, decay_H in zip(self.layers, decays_LH, strict=True):
            seen.append(x_BTM)
            x_BTM = layer(x_BTM, decay_H, positions_BT, real_BT, index, past_key_values=cache)
        if cache is not None:
            cache.num_tokens += x_BTM.shape[1]
        last = simple_rms_norm(x_BTM)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=cache, hidden_states=(*seen, last) if wanted else None
        )

    def _cache(self, given: RecurrentCache | None, use_cache: bool | None) -> RecurrentCache | None:
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if given is None:
            return RecurrentCache(len(self.layers)) if wanted else None
        if not isinstance(given, RecurrentCache):
            raise ValueError(f"past_key_values is a {type(given).__name__}, not a RecurrentCache")
        return given


class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or those of the last `logits_to_keep` positions or of the positions it holds.

        `labels` are unshifted, as in every model of transformers. See `TransNormerModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden_BTM = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BTM = hidden_BTM.index_select(1, logits_to_keep)
        else:
            hidden_BTM = hidden_BTM[:, -logits_to_keep:]
        logits = self.lm_head(hidden_BTM)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """A head in the file gives way to the embedding, as in the authors' code; transformers keeps it."""
        embedding = "model.embed_tokens.weight"
        if missing_keys is not None and self.config.tie_word_embeddings and embedding not in missing_keys:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys, recompute_mapping)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes a RecurrentCache


def _positions(x_BTM: Tensor, cache: RecurrentCache | None) -> Tensor:
    first = 0 if cache is None else cache.num_tokens
    return torch.arange(first, first + x_BTM.shape[1], device=x_BTM.device)[None]


def _real(x_BTM: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """1 for tokens and 0 for padding, of the tokens at hand: the mask speaks of those before them too."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, T), not {tuple(attention_mask.shape)}")
    return attention_mask[:, -x_BTM.shape[1] :].to(x_BTM.dtype)


def _index(x_BTM: Tensor, cache: RecurrentCache | None, layout: LayoutIndex | None) -> ChunkIndex | None:
    """How the scan cuts the row; None for a single step from a state."""
    rows, length, _ = x_BTM.shape
    if layout is not None:
        return layout.chunks
    if length == 1 and cache is not None and cache.num_tokens:
        return None
    return rows_index(rows, length, x_BTM.device)
