"""A mixture of attention modules: stick-breaking attention whose queries and outputs are routed.

Keys and values are projected once for all modules, so the KV cache does not grow with their
number, and the cost of attention grows with the modules a token uses (ModuleFormer, Shen et al.,
arXiv 2306.04640).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moekit.errors import SignalError
from moekit.experts import attention_heads
from moekit.layer import MoEOutput, MoESpec
from moekit.models.language.stick_breaking import stick_breaking_attention
from moekit.routing import Carry, Signals

if TYPE_CHECKING:
    from moekit.models.language.config import MoEDecoderConfig


class AttentionMixture(nn.Module):
    """Keys and values for all, and an MoE layer over :class:`~moekit.experts.AttentionHeads`.

    Attributes:
        mixture: the layer; the bank's map makes queries, its reduce projects what they found.
    """

    def __init__(
        self, config: MoEDecoderConfig, layer_idx: int, spec: MoESpec, previous_experts: int | None
    ) -> None:
        super().__init__()
        modules = attention_heads(spec.experts)
        assert modules is not None  # the config has checked it
        inner = modules.inner_width(config.hidden_size)
        self.layer_idx = layer_idx
        self.longest = config.max_position_embeddings
        self.head_dim = inner // modules.heads
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.mixture = spec.build(config.hidden_size, previous_experts, config.vocab_size)

    def forward(
        self,
        x_BTD: Tensor,
        signals: Signals,
        carry: Carry,
        visible_BTS: Tensor | None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[MoEOutput, Tensor | None]:
        """The layer's output, and the weights (B, heads · K, T, S) of the slots' attention.

        Args:
            visible_BTS: (B or 1, T, S), True where a query may look at a key; None where each looks
                at itself and all before it.
            past_key_values: the KV cache; S counts what it holds already.

        Raises:
            SignalError: the cache is of another model, or there is none and the sequence is longer
                than ``max_position_embeddings``.
        """
        if not x_BTD.shape[:2].numel():
            return self.mixture(x_BTD, signals, carry, lambda inner_NKI: inner_NKI), None
        self._check(x_BTD, past_key_values)
        key, value = (self._heads(project(x_BTD)) for project in (self.k_proj, self.v_proj))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        allowed = _allowed(visible_BTS, x_BTD.shape[1], key)
        seen: list[Tensor] = []

        def attend(query_NKI: Tensor) -> Tensor:
            query = self._slots(query_NKI, len(x_BTD))
            mixed, weights = stick_breaking_attention(query, key, value, allowed)
            seen.append(weights.flatten(1, 2))
            return mixed.permute(0, 3, 2, 1, 4).reshape(query_NKI.shape)

        output: MoEOutput = self.mixture(x_BTD, signals, carry, attend)
        return output, seen[0] if seen else None

    def _heads(self, projected_BTI: Tensor) -> Tensor:
        """(B, T, heads · head_dim) as (B, heads, T, head_dim)."""
        return projected_BTI.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _slots(self, query_NKI: Tensor, batch: int) -> Tensor:
        """(B · T, K, heads · head_dim) as (B, heads, K, T, head_dim)."""
        per_head = query_NKI.unflatten(-1, (-1, self.head_dim)).unflatten(0, (batch, -1))
        return per_head.permute(0, 3, 2, 1, 4)

    def _check(self, x_BTD: Tensor, cache: Cache | None) -> None:
        if cache is None and x_BTD.shape[1] > self.longest:
            raise SignalError(
                f"the sequence has {x_BTD.shape[1]} tokens and max_position_embeddings is "
                f"{self.longest}; raise it in the config, or feed the text in pieces with a cache"
            )
        layers = [] if cache is None else cache.layers[self.layer_idx : self.layer_idx + 1]
        for keys in [getattr(layer, "keys", None) for layer in layers]:
            wanted = (x_BTD.shape[0], self.k_proj.out_features // self.head_dim, self.head_dim)
            if keys is not None and keys.numel() and (*keys.shape[:2], keys.shape[3]) != wanted:
                raise SignalError(
                    f"the KV cache holds keys {tuple(keys.shape)} in layer {self.layer_idx}; this "
                    f"model wants (batch, heads, tokens, head width) with {wanted[0]}, {wanted[1]} "
                    f"and {wanted[2]}, so pass the cache that it returned itself"
                )


def _allowed(visible_BTS: Tensor | None, queries: int, key: Tensor) -> Tensor:
    """(B or 1, 1, T, S), True where a query may look at a key."""
    if visible_BTS is not None:
        return visible_BTS[:, None]
    everything = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device)
    if queries > 1:  # the first tokens of all: the places behind them are of a cache's to come
        everything = everything.tril()
    return everything[None, None]
