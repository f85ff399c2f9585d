"""What a decoder tells routers that look at other tokens: who sees whom, attention, memory."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from moekit.models.language.attention import Heads, MoEDecoderAttention
from moekit.models.language.config import MoEDecoderConfig
from moekit.routing import DotProductAttention, Signals


class _AsSDPA(SimpleNamespace):
    """What transformers' mask functions read of a config, for masks in SDPA's form."""

    _attn_implementation = "sdpa"

    def get_text_config(self) -> _AsSDPA:
        return self


AS_SDPA: Final[Any] = _AsSDPA()


@dataclass(frozen=True)
class CacheMemory:
    """Rows of earlier tokens, kept as a further layer of the KV cache.

    So beam search reorders them, assisted generation crops them and a static cache preallocates
    them as it does keys and values. Kept tensors are in the dtype of the scores.

    Attributes:
        cache: the KV cache.
        index: place of the layer in it.
    """

    cache: Cache
    index: int

    def extend(self, value_BTE: Tensor, key_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`moekit.routing.Memory`; scores stand for keys, as they are never empty."""
        layers = self.cache.layers
        while len(layers) <= self.index:
            layers.append(_layer_like(layers[0]))
        key_BTC = key_BTC.to(value_BTE.dtype)
        value, key = self.cache.update(value_BTE[:, None], key_BTC[:, None], self.index)
        return value[:, 0], key[:, 0]


def _layer_like(layer: Any) -> DynamicLayer | StaticLayer:
    """An empty layer that holds as many tokens."""
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    return DynamicLayer()  # type: ignore[no-untyped-call]


def is_readable(config: MoEDecoderConfig) -> bool:
    """Whether the mask of the attention implementation says of each pair whether it is seen."""
    return config._attn_implementation in ("eager", "sdpa")


def visible_keys(
    config: MoEDecoderConfig,
    x_BTD: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    positions: Tensor | None,
    causal_mask: Any,
) -> Tensor | None:
    """Which tokens each token sees (B or 1, T, S); None where each sees itself and all before it.

    Args:
        causal_mask: what the attention implementation takes as its mask; the other arguments are
            those that it was made from.
    """
    if isinstance(attention_mask, Mapping):  # prepared for ``generate``, or by hand
        mask = attention_mask.get("visible", attention_mask["full_attention"])
    elif is_readable(config) or not x_BTD.numel():
        mask = causal_mask
    else:
        mask = create_causal_mask(
            config=AS_SDPA,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=positions,
        )
    return None if mask is None else _visible(mask)


def _visible(mask_BATP: Tensor) -> Tensor:
    """Which tokens (B, T, P) a mask of four dimensions lets be seen, in SDPA's form or added."""
    mask_BTP = mask_BATP[:, 0]
    if mask_BTP.dtype == torch.bool:
        return mask_BTP
    return mask_BTP > torch.finfo(mask_BTP.dtype).min / 2


def with_memory(signals: Signals, wanted: Set[str], cache: Cache | None, index: int) -> Signals:
    """The signals with a memory of earlier tokens at place ``index`` of the KV cache, if wanted."""
    if "sequences" not in wanted or cache is None:
        return signals
    assert signals.sequences is not None
    memory = CacheMemory(cache, index)
    return signals.replace(sequences=signals.sequences.replace(memory=memory))


def with_attention(
    signals: Signals, wanted: Set[str], attention: MoEDecoderAttention, heads: Heads
) -> Signals:
    """The signals of one block, with those of its attention that are ``wanted``."""
    if "attention" in wanted:
        found = DotProductAttention(heads.query, heads.key, attention.scaling)
        signals = signals.replace(attention=found)
    if "value_ND" in wanted:
        signals = signals.replace(value_ND=attention.given(heads.value).flatten(0, 1))
    return signals
