"""Causal self-attention with rotary positions and grouped key-value heads.

The attention itself is whichever of transformers' implementations the config names: eager, SDPA,
flash or flex attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from moekit.models.language.config import MoEDecoderConfig

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine (B, T, head_dim) of every position."""


class MoEDecoderRotaryEmbedding(nn.Module):
    """Rotary position embeddings (Su et al. 2021), with transformers' scaling variants.

    The frequencies are no part of a checkpoint. transformers fills both buffers again after
    loading, by the names ``inv_freq`` and ``original_inv_freq``.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: MoEDecoderConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None  # the config has standardised them
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        frequencies: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS.get(
            self.rope_type, self.compute_default_rope_parameters
        )
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MoEDecoderConfig, device: torch.device | None = None, **_: Any
    ) -> tuple[Tensor, float]:
        """Frequencies ``θ^(-2i/d)`` (head_dim / 2,), and the factor 1 on cosine and sine."""
        assert config.rope_parameters is not None
        assert config.head_dim is not None
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        return config.rope_parameters["rope_theta"] ** (-exponent / config.head_dim), 1.0

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        """The rotation of ``position_ids`` (B, T), in the dtype of ``x``."""
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32)
        angle_BTC = position_ids[..., None].to(torch.float32) * inv_freq
        angle_BTC = torch.cat([angle_BTC, angle_BTC], dim=-1)
        cos = angle_BTC.cos() * self.attention_scaling
        sin = angle_BTC.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


@dataclass(frozen=True)
class Heads:
    """What attention worked with.

    Attributes:
        query: queries (B, heads, T, head_dim), rotated.
        key: keys (B, key-value heads, S, head_dim), rotated, those of the cache included.
        value: values of the T rows (B, key-value heads, T, head_dim).
    """

    query: Tensor
    key: Tensor
    value: Tensor


class MoEDecoderAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    is_causal = True  # read by transformers' attention functions

    def __init__(self, config: MoEDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Heads]:
        """The output (B, T, D), the weights where the implementation has them, and the heads."""
        query, key, value = (self._heads(p(x_BTD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rotation), rotate(key, rotation)
        own_value = value
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(mixed.flatten(2)), weights, Heads(query, key, own_value)

    def given(self, value: Tensor) -> Tensor:
        """What a row gives to one that attends to it alone, in every head (B, T, D).

        Args:
            value: (B, key-value heads, T, head_dim).
        """
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        return self.o_proj(value.transpose(1, 2).flatten(2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not query.numel():  # transformers' functions refuse empty batches and sequences
            return query.transpose(1, 2), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return mixed, weights

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, T, heads · head_dim) as (B, heads, T, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate ``heads`` (B, heads, T, head_dim), the first half of each head against the second."""
    cos, sin = (part[:, None] for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, in the signature of transformers' attention functions.

    Args:
        query: (B, heads, T, head_dim).
        key, value: (B, key-value heads, S, head_dim).
        attention_mask: added to the scores, broadcast over heads.

    Returns:
        The output (B, T, heads, head_dim) and the weights (B, heads, T, S).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
