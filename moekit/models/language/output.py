"""What the decoder and the causal language model return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from moekit.layer import MoEOutput


@dataclass
class MoEDecoderOutput(ModelOutput):
    """Output of :class:`~moekit.models.language.MoEDecoderModel`.

    Attributes:
        last_hidden_state: normalised hidden states (B, T, D).
        past_key_values: the KV cache, with ``use_cache``.
        hidden_states: the embeddings and each block's output (B, T, D), when asked for.
        attentions: each block's attention weights (B, heads, T, T), when asked for: of dense
            attention eager only; of a mixture one a head and slot, those of unused slots included.
        moe: one entry an MoE layer, from the first to the last, attention before feed-forward
            part. To save memory ``y`` is empty and ``carry`` holds nothing; the hidden states hold
            the former, ``routing`` the logits.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    moe: tuple[MoEOutput, ...] | None = None


@dataclass
class MoECausalLMOutput(ModelOutput):
    """Output of :class:`~moekit.models.language.MoEDecoderForCausalLM`.

    Attributes:
        loss: what to differentiate, when labels were given: the cross-entropy, plus the weighted
            routing losses in training mode.
        logits: next-token logits (B, T, V).
        past_key_values, hidden_states, attentions, moe: as in :class:`MoEDecoderOutput`.
        cross_entropy: mean cross-entropy in nats a target token, when labels were given. NaN if
            no token is a target.
        routing_losses: the value of each routing loss by name, unscaled and detached; empty
            without labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    routing_losses: dict[str, Tensor] | None = None
    moe: tuple[MoEOutput, ...] | None = None
