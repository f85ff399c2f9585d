"""One block: attention and a feed-forward part, each of them dense or a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from moekit.errors import SignalError
from moekit.experts import FeedForwardSpec
from moekit.layer import MoE, MoEOutput, MoESpec
from moekit.models.language.attention import Heads, MoEDecoderAttention, Rotation
from moekit.models.language.attention_mixture import AttentionMixture
from moekit.models.language.config import BlockSpec, LayerSpec, MoEDecoderConfig
from moekit.models.language.routing_signals import with_attention, with_memory
from moekit.residual import Plain, ResidualSpec
from moekit.routing import Carry, Signals


class DenseFeedForward(nn.Module):
    """A bank of one feed-forward expert that every token passes: an ordinary dense layer."""

    def __init__(self, spec: FeedForwardSpec, width: int) -> None:
        super().__init__()
        self.experts = spec.build(width)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of ``x`` (..., D)."""
        bank = self.experts
        inner = F.linear(x, bank.up_weight[0], _only(bank.up_bias))
        return F.linear(bank.activate(inner), bank.down_proj[0], _only(bank.down_bias))


Records = tuple[MoEOutput, ...]
"""The records of a block's mixtures: that of attention, then that of the feed-forward part."""


class MoEDecoderLayer(GradientCheckpointingLayer):
    """One block: ``x += attention(norm(x))``, then ``x += feed_forward(norm(x))``.

    The sum after a mixture follows the residual rule of its spec.
    """

    def __init__(
        self,
        config: MoEDecoderConfig,
        index: int,
        spec: BlockSpec,
        previous_experts: int | None,
        continues_momentum: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.depth = index, config.num_hidden_layers
        self.self_attn = _attention(config, index, spec.attention, previous_experts)
        below = spec.after_attention(previous_experts)
        self.mlp = _feed_forward(spec.feed_forward, config, below)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        first, second = _residual(spec.attention), _residual(spec.feed_forward)
        self._attention_sum = _Sum(first, continues_momentum)
        self._feed_forward_sum = _Sum(second, continues_momentum or first.tensors > 0)

    @property
    def mixtures(self) -> list[MoE]:
        """The block's MoE layers: that of attention, then that of the feed-forward part."""
        attention = [self.self_attn.mixture] if isinstance(self.self_attn, AttentionMixture) else []
        return attention + ([self.mlp] if isinstance(self.mlp, MoE) else [])

    def forward(
        self,
        x_BTD: Tensor,
        carry: Carry,
        signals: Signals,
        rotation: Rotation | None,
        visible_BTS: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Carry, Records]:
        """The block's output, what the next block is handed, and the records of its mixtures.

        A dense part hands ``carry`` on as it is and has no record.

        Raises:
            SignalError: ``carry`` lacks the momentum that a mixture below has handed on.
        """
        cache = kwargs.get("past_key_values")
        if isinstance(self.self_attn, AttentionMixture):
            x_BTD, carry, first = self._mix(x_BTD, carry, signals, visible_BTS, **kwargs)
        else:
            normed_BTD = self.input_layernorm(x_BTD)
            attended_BTD, _, heads = self.self_attn(normed_BTD, rotation, **kwargs)
            x_BTD, first = x_BTD + attended_BTD, ()
            signals = self._seen(signals, heads)
        x_BTD, carry, second = self._feed_forward(x_BTD, carry, signals, cache)
        return x_BTD, carry, first + second

    def _mix(
        self,
        x_BTD: Tensor,
        carry: Carry,
        signals: Signals,
        visible_BTS: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Carry, Records]:
        """Attention as a mixture."""
        attention, norm = self.self_attn, self.input_layernorm
        assert isinstance(attention, AttentionMixture)
        wanted, cache = attention.mixture.router.requires, kwargs.get("past_key_values")
        signals = with_memory(signals, wanted, cache, 2 * self.depth + self.index)
        return self._attention_sum(
            x_BTD,
            carry,
            lambda ahead: attention(norm(ahead), signals, carry, visible_BTS, **kwargs)[0],
        )

    def _seen(self, signals: Signals, heads: Heads) -> Signals:
        """The signals with what the feed-forward part's router wants of dense attention."""
        if not isinstance(self.mlp, MoE):
            return signals
        assert isinstance(self.self_attn, MoEDecoderAttention)
        return with_attention(signals, self.mlp.router.requires, self.self_attn, heads)

    def _feed_forward(
        self, x_BTD: Tensor, carry: Carry, signals: Signals, cache: Cache | None
    ) -> tuple[Tensor, Carry, Records]:
        part, norm = self.mlp, self.post_attention_layernorm
        if not isinstance(part, MoE):
            return x_BTD + part(norm(x_BTD)), carry, ()
        signals = with_memory(signals, part.router.requires, cache, self.depth + self.index)
        return self._feed_forward_sum(x_BTD, carry, lambda ahead: part(norm(ahead), signals, carry))


@dataclass(frozen=True)
class _Sum:
    """Adds a mixture's output to the hidden state by its residual rule.

    Attributes:
        rule: the rule.
        continued: whether a mixture below hands momentum on.
    """

    rule: ResidualSpec
    continued: bool

    def __call__(
        self, x_BTD: Tensor, carry: Carry, run: Callable[[Tensor], MoEOutput]
    ) -> tuple[Tensor, Carry, Records]:
        if self.continued and self.rule.tensors > 0 and not carry.momentum:
            raise SignalError(
                f"{type(self.rule).__name__} starts without momentum at the first MoE layer "
                "only, and this is a later one; pass the carry that the block below returned"
            )
        output = run(self.rule.look_ahead(x_BTD, carry.momentum))
        delta_BTD, momentum = self.rule.increment(x_BTD, output.y, carry.momentum)
        return x_BTD + delta_BTD, output.carry.replace(momentum=momentum), (_record(output),)


def _attention(
    config: MoEDecoderConfig, index: int, spec: MoESpec | None, previous_experts: int | None
) -> MoEDecoderAttention | AttentionMixture:
    if spec is None:
        return MoEDecoderAttention(config, index)
    return AttentionMixture(config, index, spec, previous_experts)


def _feed_forward(
    spec: LayerSpec, config: MoEDecoderConfig, previous_experts: int | None
) -> MoE | DenseFeedForward:
    if isinstance(spec, FeedForwardSpec):
        return DenseFeedForward(spec, config.hidden_size)
    return spec.build(config.hidden_size, previous_experts, config.vocab_size)


def _residual(part: LayerSpec | None) -> ResidualSpec:
    return part.residual if isinstance(part, MoESpec) else Plain()


def _record(output: MoEOutput) -> MoEOutput:
    """The output without the tensors of the hidden states' size, which would pile up."""
    return replace(output, y=output.y.new_empty(0, output.y.shape[-1]), carry=Carry())


def _only(bias_EO: Tensor | None) -> Tensor | None:
    return None if bias_EO is None else bias_EO[0]
