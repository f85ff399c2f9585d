"""Which keys a query may look at."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

if TYPE_CHECKING:
    from moekit.models.language.config import MoEDecoderConfig


def allowed_keys(
    config: MoEDecoderConfig,
    x_BTD: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    positions: Tensor | None,
) -> Tensor | None:
    """True (B or 1, 1, T, S) where a query may look at a key; None without a query.

    transformers' own mask for attention that is written out, whichever implementation the other
    layers use: causal, without padding, within its own packed sequence.
    """
    if not x_BTD.shape[:2].numel():  # generate passes embeddings of no width
        return None
    written_out = copy.copy(config)
    written_out._attn_implementation = "eager"
    mask = create_causal_mask(
        config=written_out,
        inputs_embeds=x_BTD,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=positions,
    )
    assert isinstance(mask, Tensor)  # as the eager implementation's masks are
    return mask if mask.dtype == torch.bool else mask == 0
